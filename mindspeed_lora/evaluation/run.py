"""One benchmark on rank 0: every question asked, judged and recorded, subject by subject."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from mindspeed_lora.evaluation.benchmark import Question, Verdict
from mindspeed_lora.evaluation.encoding import Asked, QuestionEncoder
from mindspeed_lora.evaluation.engine import Engine, Generation
from mindspeed_lora.evaluation.plan import BenchmarkPlan, EvaluationPlan
from mindspeed_lora.evaluation.records import Record
from mindspeed_lora.inference.scoring import Score


class BenchmarkRun:
    """Asks the questions of one benchmark.

    Args:
        engine: the model.
        plan: the job.
        task: the benchmark with its questions.
    """

    def __init__(self, engine: Engine, plan: EvaluationPlan, task: BenchmarkPlan) -> None:
        self.engine = engine
        self.plan = plan
        self.task = task
        self.cut = 0
        """Questions whose prompt was cut in front."""

    def records(self) -> Iterator[tuple[str, list[Record]]]:
        """Subject and records, subject after subject."""
        for subject, questions in groupby(self.task.questions, key=lambda question: question.subject):
            yield subject, self._subject(list(questions))

    def _subject(self, questions: list[Question]) -> list[Record]:
        """A subject may hold questions with and without choices; its records are in the order of the questions."""
        always = self.plan.evaluation.origin_postprocess
        generated = [self.task.benchmark.generates(question, always) for question in questions]
        encoder = self.plan.question_encoder
        parts = {
            kind: iter(
                ask([one for one, own in zip(questions, generated, strict=True) if own is kind], encoder)
            )
            for kind, ask in ((False, self._compared), (True, self._generated))
        }
        return [next(parts[kind]) for kind in generated]

    def _compared(self, questions: list[Question], encoder: QuestionEncoder) -> list[Record]:
        asked = [self._counted(encoder.to_score(question)) for question in questions]
        scores = self.engine.score([one.to_score for one in asked])
        rule = self.plan.evaluation.choice_score or self.task.benchmark.choice_score
        return [_compared(one, found, rule) for one, found in zip(asked, scores, strict=True)]

    def _generated(self, questions: list[Question], encoder: QuestionEncoder) -> list[Record]:
        benchmark, most = self.task.benchmark, self.task.max_new_tokens
        words = benchmark.stop_words if encoder.encoder.is_raw else ()
        asked = [self._counted(encoder.to_generate(question, most)) for question in questions]
        order = Generation(
            tuple(one.to_generate(most) for one in asked),
            self.plan.choice,
            words,
            benchmark.num_beams,
        )
        records = []
        for one, answer in zip(asked, self.engine.generate(order), strict=True):
            text = self.engine.text(answer, words)
            records.append(_generated(one, text, benchmark.judge(one.question, text)))
        return records

    def _counted(self, asked: Asked) -> Asked:
        self.cut += asked.cut > 0
        return asked


def _compared(asked: Asked, scores: Sequence[Score], rule: str) -> Record:
    """The choice of the highest score; of equal ones the first."""
    question = asked.question
    values = [score.log_likelihood for score in scores]
    lengths = {
        "sum": [1] * len(values),
        "tokens": [len(tokens) for tokens in asked.continuations],
        "characters": [max(1, len(choice)) for choice in question.choices],
    }[rule]
    compared = [value / length for value, length in zip(values, lengths, strict=True)]
    prediction = question.labels[compared.index(max(compared))]
    return Record(
        subject=question.subject,
        index=question.index,
        prompt=asked.prompt,
        choices=list(question.choices),
        loglikelihoods=values,
        prediction=prediction,
        answer=question.answer,
        correct=None if question.answer is None else prediction == question.answer,
    )


def _generated(asked: Asked, text: str, verdict: Verdict) -> Record:
    question = asked.question
    return Record(
        subject=question.subject,
        index=question.index,
        prompt=asked.prompt,
        choices=list(question.choices),
        loglikelihoods=[],
        prediction=verdict.prediction,
        answer=question.answer,
        correct=verdict.correct,
        text=text,
    )
