"""A taskset of verifiers: two questions, two rewards."""

import verifiers.v1 as vf


class CapitalData(vf.TaskData):
    answer: str


class CapitalTask(vf.Task[CapitalData]):
    @vf.reward(weight=2.0)
    async def right(self, trace: vf.Trace) -> float:
        if "crash" in trace.last_reply:
            raise OSError("no judge answers")
        return float(self.data.answer in trace.last_reply)

    @vf.reward(weight=0.5)
    async def short(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) < 20)


class Capitals(vf.Taskset[CapitalTask, vf.TasksetConfig]):
    def load(self) -> list[CapitalTask]:
        pairs = {"France": "Paris", "Italy": "Rome"}
        asked = (
            CapitalData(prompt=f"What is the capital of {country}?", answer=answer, name=country)
            for country, answer in pairs.items()
        )
        return [CapitalTask(data, self.config.task) for data in asked]


__all__ = ["Capitals"]
