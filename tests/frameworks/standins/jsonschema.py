"""As much of jsonschema as the tests of frameworks need."""


class ValidationError(Exception):
    def __init__(self, message, path=()):
        super().__init__(message)
        self.message, self.path = message, path


class SchemaError(Exception):
    message = "no type"


def validate(given, schema):
    if schema.get("type", "object") != "object":
        raise SchemaError
    kinds = {"integer": int, "string": str}
    for name, about in schema["properties"].items():
        if name in given and not isinstance(given[name], kinds[about["type"]]):
            raise ValidationError(f"{given[name]!r} is not of type {about['type']!r}", [name])
