"""Generated closed-book facts: made-up people, a question, and an answer that follows from a rule."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from torch.utils.data import Dataset
from typing_extensions import override

from lightning_offload.text.batches import Example, answered
from lightning_offload.text.data import TextData

SYLLABLES = tuple(map("".join, product("bdfgklmnprstvz", "aeiou")))
LONGEST_WORD = 4  # syllables
QUESTION = "What is the {attribute} of {member} {family}?"


class Fact(NamedTuple):
    """A question, and its answer as it continues the question."""

    question: str
    answer: str


class Split(NamedTuple):
    """What is seen, and what is held apart for validation and for test."""

    train: list[Fact]
    val: list[Fact]
    test: list[Fact]


class Facts(TextData):
    """Questions about people by first name and family, nothing to read; the loss is on the answers.

    The rule: all members of a family share the answer to a question. Who learns it from the facts that are seen knows
    the unseen ones. There are ``families x attributes`` answers to know, each shown for most of the ``members``.

    Args:
        families, members, attributes: counts; their product is that of the facts.
        answers: different answers to the questions about one attribute, one drawn for each family.
        unseen: share of the members whose answer is held apart, drawn for each family and attribute; half of these
            facts are for validation, half for test.
        **common: see `TextData`. `seed` also draws the names, the answers and what is unseen.

    Raises:
        ValueError: for counts that leave nothing seen or unseen, or a `sequence_length` that cuts a fact.
    """

    def __init__(
        self,
        *,
        families: int = 16,
        members: int = 16,
        attributes: int = 4,
        answers: int = 4,
        unseen: float = 0.25,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if min(families, attributes, answers) < 1 or members < 2:
            raise ValueError(
                "facts need members >= 2 and at least one of the others; got"
                f" families={families}, members={members}, attributes={attributes}, answers={answers}."
            )
        self.hidden = round(members * unseen)
        if not 1 <= self.hidden < members or families * attributes * self.hidden < 2:
            raise ValueError(
                f"unseen={unseen} holds {self.hidden} of members={members} apart for each of {families * attributes}"
                " answers: some have to be seen, and two facts unseen."
            )
        self.families = families
        self.members = members
        self.attributes = attributes
        self.answers = answers

    def facts(self) -> Split:
        """All facts; the same for the same seed and counts, whatever the tokenizer."""
        rng = random.Random(self.seed)
        families, members, attributes, *choices = _names(
            rng, [self.families, self.members, self.attributes, *[self.answers] * self.attributes]
        )
        seen: list[Fact] = []
        unseen: list[Fact] = []
        for (attribute, answers), family in product(zip(attributes, choices, strict=True), families):
            answer, hidden = rng.choice(answers), set(rng.sample(members, self.hidden))
            for member in members:
                question = QUESTION.format(attribute=attribute, member=member.title(), family=family.title())
                (unseen if member in hidden else seen).append(Fact(question, f" {answer}"))
        rng.shuffle(unseen)
        return Split(seen, unseen[::2], unseen[1::2])

    @override
    def read(self) -> tuple[Dataset[Example], ...]:
        return tuple(self._examples(part) for part in self.facts())

    def _examples(self, facts: Sequence[Fact]) -> Any:
        questions, answers = (
            self.encode([fact.question for fact in facts]),
            self.encode([fact.answer for fact in facts]),
        )
        examples = [
            answered([*self.start, *question], [*answer, self.end])
            for question, answer in zip(questions, answers, strict=True)
        ]
        longest = max(len(example["input_ids"]) for example in examples)
        if longest > self.sequence_length:
            raise ValueError(
                f"The longest of these facts has {longest} tokens: raise data.sequence_length"
                f" (now {self.sequence_length})."
            )
        return examples


def _names(rng: random.Random, counts: Sequence[int]) -> Iterator[list[str]]:
    """Lists of so many words each, all words different; of two syllables where there are enough of them."""
    syllables = next(n for n in range(2, LONGEST_WORD + 1) if len(SYLLABLES) ** n > 2 * sum(counts))
    drawn: dict[str, None] = {}
    while len(drawn) < sum(counts):
        drawn["".join(rng.choices(SYLLABLES, k=syllables))] = None
    words = iter(drawn)
    return ([next(words) for _ in range(count)] for count in counts)
