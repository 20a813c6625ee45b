"""A trial's configuration."""


class TrialConfig(dict):
    model_validate = classmethod(lambda cls, given: cls(given))
