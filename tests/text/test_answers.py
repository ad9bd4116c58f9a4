import json
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn

from lightning_offload.errors import DataError
from lightning_offload.text import TINY_PATH, CausalLM, Facts, Gsm8k, PromptClassifier, PythonDocs
from lightning_offload.text.answers import asked, continued
from lightning_offload.text.batches import answered, collate
from tests.lit import offload
from tests.zo2 import zo2

SMALL = {"families": 4, "members": 4, "attributes": 2, "answers": 3, "unseen": 0.5}


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **options)


class Says(nn.Module):
    """A network that answers each question with `says(answer)`, and gives every token the same probability."""

    def __init__(self, tokenizer, answers, says):
        super().__init__()
        self.tokenizer, self.answers, self.says = tokenizer, answers, says

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, len(self.tokenizer)))

    def generate(self, input_ids, attention_mask, **_):
        prompts = [self.tokenizer.decode(row[mask.bool()]) for row, mask in zip(input_ids, attention_mask, strict=True)]
        said = [self.tokenizer(self.says(self.answers[prompt]))["input_ids"] for prompt in prompts]
        width = max(map(len, said))
        return torch.cat([input_ids, torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in said])], 1)


@pytest.fixture
def judged(small_model):
    """A function from data, its answers and what is said of them to the metrics of the test."""

    def run(data, answers, says, **options):
        module = small_model(**options)
        data.tokenizer = module.tokenizer
        module.network = Says(module.tokenizer, answers, says)
        return trainer().test(module, data, verbose=False)[0]

    return run


@pytest.mark.parametrize(
    ("says", "exact", "contains"),
    [
        (lambda answer: answer, 1, 1),
        (lambda answer: f"{answer.strip()} \nWhat is", 1, 1),
        (lambda answer: f"{answer} or so", 0, 1),
        (lambda answer: f"no\n{answer}", 0, 0),
        (lambda answer: answer.upper(), 0, 0),
        (lambda answer: "", 0, 0),
    ],
)
def test_what_counts_as_right(says, exact, contains, judged):
    data = Facts(val_batch_size=3, **SMALL)
    answers = dict(data.facts().test)
    assert judged(data, answers, says, match_answers="exact")["test/exact_match"] == exact
    assert judged(data, answers, says, match_answers="contains")["test/contains_match"] == contains
    assert not {"test/exact_match", "test/contains_match"} & judged(data, answers, says).keys()


def test_the_share_is_of_examples_not_of_batches(judged):
    data = Facts(val_batch_size=7, **SMALL)  # 7 and 1
    answers = dict(data.facts().test)
    wrong = list(answers.values())[-1]
    right = sum(answer != wrong for answer in answers.values())
    says = {answer: answer for answer in answers.values()} | {wrong: "no"}
    assert len(answers) == 8 > right > 0
    found = judged(data, answers, says.__getitem__, match_answers="exact")["test/exact_match"]
    assert found == pytest.approx(right / 8)


ANSWERS = {"Question: How many?\nAnswer:": "They are\n1234.\n#### 1234"}


@pytest.fixture
def gsm8k(tmp_path):
    """A folder with one question."""
    row = {"question": "How many?", "answer": "They are\n1234.\n#### 1234"}
    for split, rows in {"train": [row] * 2, "test": [row]}.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("says", "right"),
    [
        (lambda answer: "It is\n\n1,234 in all.\n#### 1,234", 1),
        (lambda answer: "#### $1234.", 1),
        (lambda answer: "1 more is 1234", 0),
        (lambda answer: "#### 123", 0),
    ],
)
def test_of_gsm8k_the_final_number_counts(says, right, judged, gsm8k):
    data = Gsm8k(path=gsm8k, val_examples=1)
    assert judged(data, ANSWERS, says, match_answers="exact")["test/exact_match"] == right


@pytest.mark.filterwarnings("ignore:.* are cut on the right")
def test_an_answer_that_is_cut_is_not_counted_as_wrong(judged, gsm8k):
    data = Gsm8k(path=gsm8k, val_examples=1, sequence_length=20)
    with pytest.raises(DataError, match=r"Nothing counts in the answer .*raise data\.sequence_length"):
        judged(data, ANSWERS, str, match_answers="exact")


@pytest.fixture(scope="module")
def tiny():
    return CausalLM(path=TINY_PATH).eval()


@pytest.fixture
def examples(tokenizer):
    prompts = ["Return", "The list of all", "If the file is not found then it", "x"]
    return [answered(ids, [5, 0]) for ids in tokenizer(prompts)["input_ids"]]


def left_padded(batch):
    """The same batch, its padding moved to the other side."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return {
        name: torch.stack([row.roll(-n) for row, n in zip(rows, lengths, strict=True)]) for name, rows in batch.items()
    }


def test_neither_padding_nor_its_side_changes_an_answer(tiny, examples):
    batch = collate(examples, pad=0)
    say = partial(continued, tiny.network, tokenizer=tiny.tokenizer, max_new_tokens=12, end=None)
    together = say(asked(batch).prompts)
    assert len(set(together)) == len(examples)
    assert say(asked(left_padded(batch)).prompts) == together
    assert [say(asked(collate([example], pad=0)).prompts)[0] for example in examples] == together
    for example, text in zip(examples, together, strict=True):
        prompt = tiny.tokenizer.decode(example["input_ids"][:-2])
        assert tiny.generate(prompt, max_new_tokens=12) == text


def test_the_models_own_settings_of_generation_do_not_count(tiny, examples):
    say = partial(continued, tiny.network, asked(collate(examples, pad=0)).prompts, tokenizer=tiny.tokenizer)
    plain = say(max_new_tokens=8, end=None)
    own = tiny.network.generation_config
    own.do_sample, own.repetition_penalty, own.num_beams = True, 3.0, 2
    try:
        assert say(max_new_tokens=8, end=None) == plain
    finally:
        own.do_sample, own.repetition_penalty, own.num_beams = False, 1.0, 1


def test_where_an_answer_ends(small_model):
    module = small_model().eval()
    word = {text: module.tokenizer(text)["input_ids"][-1] for text in ("a", "b", "c", "d", "\n")}
    chain = {word["a"]: word["b"], word["b"]: word["\n"], word["\n"]: word["c"], word["c"]: 0, word["d"]: word["d"]}
    forwards = []

    def scripted(network, args, kwargs, output):
        last = kwargs["input_ids"][:, -1].tolist()
        forwards.append(last)
        output.logits.zero_()
        for row, token in enumerate(last):
            output.logits[row, -1, chain.get(token, 0)] = 1.0

    module.network.register_forward_hook(scripted, with_kwargs=True)
    prompts = [torch.tensor([7, word["a"]]), torch.tensor([word["c"]])]

    def say(extra=(), **options):
        forwards.clear()
        return continued(module.network, [*prompts, *extra], tokenizer=module.tokenizer, **options)

    assert (say(max_new_tokens=9, end="\n"), len(forwards)) == (["b", ""], 2)
    assert (say(max_new_tokens=9, end=None), len(forwards)) == (["b\nc", ""], 4)
    endless = [torch.tensor([word["d"]])]
    assert (say(endless, max_new_tokens=6, end="\n"), len(forwards)) == (["b", "", "dddddd"], 6)


class Records(CausalLM):
    """Keeps what it says."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.said.extend(
            continued(self.network, asked(batch).prompts, tokenizer=self.tokenizer, max_new_tokens=6, end=None)
        )

    test_step = validation_step

    def on_validation_epoch_start(self):
        super().on_validation_epoch_start()
        self.said = []

    on_test_epoch_start = on_validation_epoch_start


@pytest.mark.parametrize("strategy", [offload, zo2], ids=["full", "zo2"])
def test_offloaded_weights_give_the_answers_of_plain_ones(strategy):
    module = Records(path=TINY_PATH, match_answers="contains", optimizer=partial(torch.optim.SGD, lr=1e-3))
    data = Facts(sequence_length=32, val_batch_size=4, paraphrases=4, tokenizer=module.tokenizer, **SMALL)
    run = trainer(strategy=strategy(), max_steps=3, val_check_interval=3)
    run.fit(module, data)
    within = module.said
    run.test(module, data, verbose=False)
    offloaded = module.said

    plain = Records(path=TINY_PATH, match_answers="contains")
    plain.load_state_dict(module.state_dict())
    trainer().validate(plain, data, verbose=False)
    assert within == plain.said
    trainer().test(plain, data, verbose=False)
    assert offloaded == plain.said
    assert len(set(offloaded)) > 1


@pytest.mark.slow  # half a minute
def test_trained_facts_are_recalled_when_asked_in_another_way():
    module = CausalLM(path=TINY_PATH, optimizer=partial(torch.optim.AdamW, lr=2e-3), match_answers="exact")
    data = Facts(
        families=25, members=1, attributes=2, answers=50, unseen=0.0, ask="trained", paraphrases=4,
        sequence_length=32, batch_size=16, val_batch_size=64, tokenizer=module.tokenizer,
    )  # fmt: skip
    run = trainer(strategy=offload(), max_steps=150, limit_val_batches=0)
    assert run.test(module, data, verbose=False)[0]["test/exact_match"] == 0
    run.fit(module, data)
    assert run.test(module, data, verbose=False)[0]["test/exact_match"] > 0.7


def test_what_cannot_be_asked(small_model, tokenizer):
    docs = PythonDocs(sequence_length=32, limit_train_tokens=64, limit_val_tokens=64, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"match_answers takes examples of one prompt and one answer .* 32 of 32"):
        trainer().validate(small_model(match_answers="exact"), docs, verbose=False)
    with pytest.raises(ValueError, match=r"match_answers='equal', max_answer_tokens=64: the choice is 'exact'"):
        small_model(match_answers="equal")
    with pytest.raises(ValueError, match="max_answer_tokens=0"):
        small_model(max_answer_tokens=0)
    with pytest.raises(ValueError, match="match_answers is for CausalLM: PromptClassifier reports its accuracy"):
        PromptClassifier(path=TINY_PATH, match_answers="exact")
