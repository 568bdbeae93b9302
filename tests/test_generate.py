"""Fast generation against model.py's, which has no cache: batches, prefixes, buckets, steps queued ahead; sampling."""
import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from helpers import (SMALL, all_logits, draw_image, draw_prompt, draw_words, fast_answers, plain_answer,
                     random_model)

import lib.generate
from data import IMAGE_ID
from lib.generate import Decode, KVCache, Session, sample_next_token, split_rows
from model import LLaVAPhi, Phi, PhiConfig

P = SMALL.vision.n_patches
NO_IMAGE = torch.zeros(0, 3, 28, 28, dtype=torch.uint8)
EOS = 0


@pytest.fixture(scope="module")
def small():
    """Its answers vary, and end at different lengths."""
    return random_model(SMALL, 20, eos_bias=6)


def count_images(model: LLaVAPhi) -> list[int]:
    """How many pictures each call of the tower sees, from now on."""
    calls = []
    model.vision.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


def count_tokens(model: LLaVAPhi) -> list[int]:
    """How many tokens each call of the decoder sees, from now on."""
    calls = []
    model.llm.h[0].register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls

# ---------------------------------------------------------------------------------------------------
# Every fast path against the plain one


@pytest.mark.parametrize("seed", range(6))
def test_cached_batched_and_shared_equal_the_slow_path(small, seed):
    """A ragged batch with 0, 1 and 2 pictures, some of them shared between prompts, in random order."""
    rng = random.Random(seed)
    batch = [draw_prompt(rng, n) for n in (0, 1, 2, 1)]
    head, images = draw_prompt(rng, 1 + seed % 2)
    batch += [(head + draw_words(rng, n), images) for n in (0, 1, 5)]      # three questions about the same pictures
    rng.shuffle(batch)
    prompts, pictures = map(list, zip(*batch))
    expected = [plain_answer(small, prompt, pics, 9) for prompt, pics in batch]
    assert fast_answers(small, prompts, pictures, 9) == expected
    assert [fast_answers(small, [prompt], [pics], 9)[0] for prompt, pics in batch] == expected
    assert len({tuple(answer) for answer in expected}) > 3  # the test would be empty if all answers were alike


def test_prompts_that_do_not_go_through_together_change_nothing(small, monkeypatch):
    """On a CPU a prefill takes a few prompts at a time, each with its own rows of the cache and its own pictures."""
    rng = random.Random(1)
    head, shared = draw_prompt(rng, 1)
    batch = [draw_prompt(rng, n) for n in (1, 0, 2, 1)] + [(head + draw_words(rng, n), shared) for n in (1, 5)]
    prompts, pictures = map(list, zip(*batch))
    lengths = [len(prompt) for prompt in prompts]
    expected = fast_answers(small, prompts, pictures, 9)
    for enough in (1, max(lengths) + 1, sum(lengths)):
        monkeypatch.setattr(lib.generate, "CPU_PREFILL", enough)
        assert fast_answers(small, prompts, pictures, 9) == expected


@pytest.mark.parametrize("enough, parts", [(1, [1, 1, 1, 1]), (5, [2, 2]), (6, [3, 1]), (99, [4])])
def test_rows_are_split_where_there_are_enough_tokens(enough, parts):
    split = list(split_rows(range(4), [4, 1, 3, 2], enough))
    assert [len(part) for part in split] == parts
    assert [row for part in split for row in part] == [0, 1, 2, 3]


def test_answers_end_row_by_row(small):
    """A row that has ended says None from then on, and the last column still holds a token."""
    rng = random.Random(3)
    batch = [draw_prompt(rng, 0) for _ in range(12)]
    prompts, pictures = map(list, zip(*batch))
    columns = list(Session(small).generate(prompts, pictures, max_new_tokens=12, eos_id=EOS))
    lengths = set()
    for row in zip(*columns):
        n = sum(i is not None for i in row)
        assert all(i is None for i in row[n:]) and EOS not in row
        lengths.add(n)
    assert len(lengths) > 2
    assert any(i is not None for i in columns[-1])


def test_columns_come_as_they_are_made(small):
    """The first token needs no decoding step, and each further one needs one."""
    prompt, images = draw_prompt(random.Random(5), 1)
    model = copy.deepcopy(small)
    stream = Session(model).generate([prompt], [images], max_new_tokens=9, eos_id=-1)
    tokens = count_tokens(model)
    assert next(stream)[0] is not None and tokens == [len(prompt)]
    next(stream)
    assert tokens == [len(prompt), 1]


@pytest.mark.parametrize("room", [1, 2, 5])
def test_answers_stop_where_the_positions_end(small, room):
    """...and the other rows go on: each equals what it says alone."""
    rng = random.Random(room)
    full, short = draw_words(rng, 64 - room), draw_words(rng, 3)
    expected = [plain_answer(small, prompt, NO_IMAGE, 20) for prompt in (full, short)]
    session = Session(small)
    assert fast_answers(session, [short, full], [NO_IMAGE, NO_IMAGE], 20) == expected[::-1]
    assert len(expected[0]) <= room
    again = full[:30] + [1, 2, 3]
    assert fast_answers(session, [again], [NO_IMAGE], 5) == [plain_answer(small, again, NO_IMAGE, 5)]


def test_every_answer_says_why_it_ended(small):
    """At the end of text, at max_new_tokens, or where the positions are full, which more tokens would not change."""
    rng = random.Random(3)
    prompts = [draw_words(rng, n) for n in (3, 5, 7, 60, 55)]
    session = Session(small)
    said = fast_answers(session, prompts, [NO_IMAGE] * 5, 9, eos_id=EOS)
    for prompt, answer, finish in zip(prompts, said, session.finish):
        longer = plain_answer(small, prompt, NO_IMAGE, 10, EOS)
        if len(prompt) + len(answer) == 64:
            assert finish == "context"
        elif len(answer) == 9 and len(longer) == 10:
            assert finish == "length"
        else:
            assert finish in ("stop", "length") and (finish == "stop" or len(answer) == 9)
    assert set(session.finish) == {"stop", "length", "context"}, session.finish


def test_an_answer_that_is_being_written_has_not_finished(small):
    session = Session(small)
    stream = session.generate([[1, 2], [3] * 62], [NO_IMAGE] * 2, max_new_tokens=4, eos_id=-1)
    finishes = []
    for column in stream:
        finishes.append(list(session.finish))
    assert finishes == [["", ""], ["", "context"], ["", "context"], ["length", "context"]]


def test_one_picture_many_questions_is_one_look(small):
    model = copy.deepcopy(small)
    seen = count_images(model)
    rng = random.Random(0)
    head, images = draw_prompt(rng, 1)
    prompts = [head + draw_words(rng, n) for n in (1, 4, 2, 7)]
    copies = [images.clone() for _ in prompts]              # a picture is recognized by its pixels
    assert fast_answers(model, prompts, copies, 4) == [plain_answer(small, prompt, images, 4) for prompt in prompts]
    assert sum(seen) == 1


def test_a_chat_only_computes_what_is_new(small):
    """Turn after turn in one session equals every turn from nothing; the tower looks once per picture."""
    model = copy.deepcopy(small)
    seen, tokens = count_images(model), count_tokens(model)
    rng, session = random.Random(1), Session(model)
    prompt, images = draw_prompt(rng, 1)
    for turn in range(4):
        expected = plain_answer(small, prompt, images, 5)
        tokens.clear()
        assert fast_answers(session, [prompt], [images.clone()], 5) == [expected]
        assert sum(tokens) < 12 or turn == 0
        prompt = prompt + expected + [EOS] + draw_words(rng, 3)
    assert sum(seen) == 1
    other = draw_image(rng)                                 # another picture behind the same words
    assert fast_answers(session, [prompt], [other], 5) == [plain_answer(small, prompt, other, 5)]
    assert sum(seen) == 2


def test_the_first_of_two_pictures_can_be_known(small):
    """The same picture, then another one: only the other one is looked at."""
    model = copy.deepcopy(small)
    seen, session = count_images(model), Session(model)
    rng = random.Random(2)
    prompt, images = draw_prompt(rng, 2)
    fast_answers(session, [prompt], [images], 3)
    changed = torch.cat([images[:1], draw_image(rng)])
    assert fast_answers(session, [prompt], [changed], 5) == [plain_answer(small, prompt, changed, 5)]
    assert seen == [2, 1]


def test_the_next_batch_goes_on_with_the_last_ones_picture(small):
    """As eval.py asks: questions about one picture may be spread over two batches."""
    model = copy.deepcopy(small)
    seen, session = count_images(model), Session(model)
    rng = random.Random(6)
    head, images = draw_prompt(rng, 1)
    for size in (3, 2):
        other, other_images = draw_prompt(rng, 1)
        prompts = [other] + [head + draw_words(rng, n) for n in range(1, size)]
        pictures = [other_images] + [images] * (size - 1)
        expected = [plain_answer(small, prompt, picture, 5) for prompt, picture in zip(prompts, pictures)]
        assert fast_answers(session, prompts, pictures, 5) == expected
    assert sum(seen) == 3                                   # the picture in both batches, and the two others


def test_a_session_survives_an_interrupted_answer(small):
    """Nothing has to be closed. The token that was said last has not been fed back, the others are known."""
    model = copy.deepcopy(small)
    prompt, images = draw_prompt(random.Random(2), 1)
    session = Session(model)
    stream = session.generate([prompt], [images], max_new_tokens=9, eos_id=-1)
    said = [next(stream)[0] for _ in range(3)]
    prompt = prompt + said + [7, 8]
    tokens = count_tokens(model)
    assert fast_answers(session, [prompt], [images], 5) == [plain_answer(small, prompt, images, 5)]
    assert tokens[0] == 3                                   # said[2], 7 and 8
    assert next(stream)[0] is not None                      # the first answer would still go on, undisturbed


def test_a_picture_at_the_very_end_is_known_whole(small):
    """Without words behind it, one position short of the prompt would cut the picture in two."""
    rng, session = random.Random(4), Session(small)
    images = draw_image(rng, 2)
    prompt = [5, 6] + [IMAGE_ID] * P + [7] + [IMAGE_ID] * P
    for _ in range(2):
        assert fast_answers(session, [prompt], [images], 4) == [plain_answer(small, prompt, images, 4)]
    assert fast_answers(small, [prompt] * 2, [images] * 2, 4) == [plain_answer(small, prompt, images, 4)] * 2


def test_the_same_picture_twice_in_a_row(small):
    """Neighbors with the same pixels are still two pictures."""
    image = draw_image(random.Random(4))
    images = torch.cat([image, image])
    prompt = [5] + [IMAGE_ID] * (2 * P)
    session = Session(small)
    for _ in range(2):
        assert fast_answers(session, [prompt], [images], 4) == [plain_answer(small, prompt, images, 4)]
        assert fast_answers(session, [prompt + [8]], [images], 4) == [plain_answer(small, prompt + [8], images, 4)]


def test_fixed_shapes_change_nothing(small, monkeypatch):
    """On CUDA a step reads the cache in buckets of 256 positions and masks what is not there yet."""
    class Bucketed(KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            self.bucket = 16

    rng = random.Random(6)
    prompts, pictures = map(list, zip(*(draw_prompt(rng, n) for n in (0, 2, 1))))
    expected = fast_answers(small, prompts, pictures, 9)
    monkeypatch.setattr(lib.generate, "KVCache", Bucketed)
    assert fast_answers(small, prompts, pictures, 9) == expected


@pytest.mark.parametrize("room", [1, 5, 30])
def test_a_step_ahead_of_the_host_changes_nothing(small, room):
    """With a CUDA graph the next step is queued before a token is read, also at the last position."""
    rng, session = random.Random(room), Session(small, cuda_graph=True)
    prompts, pictures = [draw_words(rng, 3), draw_words(rng, 64 - room)], [NO_IMAGE, NO_IMAGE]
    expected = fast_answers(small, prompts, pictures, 9)
    assert fast_answers(session, prompts, pictures, 9) == expected
    again = prompts[1][:30] + [1, 2, 3]
    assert fast_answers(session, [again], [NO_IMAGE], 5) == [plain_answer(small, again, NO_IMAGE, 5)]

# ---------------------------------------------------------------------------------------------------
# Sampling


def draws(logits: list[float], n: int = 4000, **options) -> list[float]:
    """Share of each id among n draws."""
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    rows = torch.tensor(logits).expand(n, -1)
    ids = sample_next_token(rows, generator=torch.Generator().manual_seed(0), **settings)
    return (ids.bincount(minlength=len(logits)) / n).tolist()


def test_sampling_is_greedy_at_temperature_zero():
    assert sample_next_token(torch.tensor([[1.0, 3.0, 2.0], [5.0, 3.0, 5.0]]), 0, 0, 1.0, None).tolist() == [1, 0]


def test_sampling_draws_from_the_distribution():
    probabilities = [0.1, 0.5, 0.15, 0.25]
    logits = [math.log(p) for p in probabilities]
    assert draws(logits) == pytest.approx(probabilities, abs=0.03)
    assert draws(logits, top_k=2) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert draws(logits, top_p=0.7) == pytest.approx([0, 2 / 3, 0, 1 / 3], abs=0.03)
    assert draws(logits, top_p=0.4) == [0, 1, 0, 0]          # the best is always allowed
    assert draws(logits, temperature=0.01) == [0, 1, 0, 0]
    assert draws(logits, top_k=99) == pytest.approx(probabilities, abs=0.03)


def test_same_seed_same_answer(small):
    prompt, images = draw_prompt(random.Random(8), 1)
    settings = {"temperature": 2.0, "top_p": 0.9}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1, 2)]
    said = [fast_answers(small, [prompt], [images], 9, generator=generator, **settings) for generator in generators]
    assert said[0] == said[1] and said[2] != said[3]

# ---------------------------------------------------------------------------------------------------
# Attention of one query


@pytest.mark.parametrize("lengths", [[37], [5, 5], [40, 1, 17]])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_attention_of_one_query_is_torchs_fused_attention(dtype, bound, lengths):
    """One token for each sequence, which may see what its own sequence holds and itself."""
    torch.manual_seed(0)
    llm = Phi(PhiConfig(vocab_size=8, n_layer=1, n_head=4, n_embd=64, n_inner=8)).to(dtype)
    cache = KVCache(llm, [[]] * len(lengths), 48)
    cache.k.copy_(torch.randn_like(cache.k))
    cache.v.copy_(torch.randn_like(cache.v))
    cache.lengths, cache.pos = lengths, torch.tensor(lengths)
    q, k, v = (torch.randn(len(lengths), 4, 16, dtype=dtype) for _ in range(3))
    y = Decode(cache).attend(q, k, v, layer=0)
    for row, n in enumerate(lengths):
        keys, values = cache.k[0, row, :, :n + 1].to(dtype), cache.v[0, row, :, :n + 1]
        assert torch.equal(keys[:, n], k[row]) and torch.equal(values[:, n], v[row])
        expected = F.scaled_dot_product_attention(q[row, :, None], keys, values)[:, 0]
        torch.testing.assert_close(y[row], expected, atol=bound, rtol=bound)

# ---------------------------------------------------------------------------------------------------
# Log-probabilities


def forced(model: LLaVAPhi, prompt: list[int], images: torch.Tensor, answer: list[int]) -> torch.Tensor:
    """The oracle: one plain forward over prompt and answer -> log-probabilities (len(answer), V)."""
    return all_logits(model, [prompt + answer], images)[len(prompt) - 1:-1].log_softmax(-1)


@pytest.mark.parametrize("n_images", [0, 1, 2])
def test_scores_of_answers_are_teacher_forced_losses(small, n_images):
    """Several answers behind one prompt, whatever their lengths and whatever the session remembers."""
    rng, session = random.Random(n_images), Session(small)
    for n_answers in (1, 7):
        prompt, images = draw_prompt(rng, n_images)
        answers = [draw_words(rng, rng.randrange(1, 6)) for _ in range(n_answers)]
        for _ in range(2):                                  # the second time all but one token is in the cache
            for answer, scores in zip(answers, session.score(prompt, images, answers), strict=True):
                expected = forced(small, prompt, images, answer).gather(1, torch.tensor(answer)[:, None])[:, 0]
                assert torch.allclose(torch.tensor(scores), expected, atol=1e-5, rtol=0)


def test_the_prompt_of_many_answers_runs_once(small, monkeypatch):
    """Ten answers cost the prompt and their own few tokens, also where they come in several batches."""
    model = copy.deepcopy(small)
    seen, tokens = count_images(model), count_tokens(model)
    rng = random.Random(3)
    prompt, images = draw_prompt(rng, 1)
    answers = [draw_words(rng, 3) for _ in range(10)]
    at_once = Session(model).score(prompt, images, answers)
    assert sum(seen) == 1 and tokens == [len(prompt) - 1, 30]
    monkeypatch.setattr(lib.generate, "CPU_PREFILL", 9)
    assert torch.allclose(torch.tensor(Session(model).score(prompt, images, answers)), torch.tensor(at_once), atol=1e-5)
    assert sum(seen) == 2 and tokens[3:] == [9, 9, 9, 3]


def test_an_answer_to_be_scored_may_end_at_the_last_position(small):
    """Its last token takes none, since nothing is computed after it."""
    [scores] = Session(small).score([1] * 60, NO_IMAGE, [[2] * 5])
    assert torch.allclose(torch.tensor(scores), forced(small, [1] * 60, NO_IMAGE, [2] * 5)[:, 2], atol=1e-5)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0, "top_k": 5}])
def test_logprobs_of_generated_tokens_are_the_models_own(small, sampling):
    """Each is the teacher-forced one, before temperature and top_k; the token that ends an answer is among them."""
    rng = random.Random(5)
    prompts, pictures = zip(*[draw_prompt(rng, n) for n in (1, 0, 2)])
    session = Session(small)
    options = {name: value for name, value in sampling.items()} | {"generator": torch.Generator().manual_seed(0)}
    answers = fast_answers(session, prompts, pictures, 12, logprobs=3, **options)
    assert len(set(map(len, answers))) > 1                  # some end before others
    for prompt, images, answer, scored, finish in zip(prompts, pictures, answers, session.scored, session.finish):
        said = answer + [EOS] * (finish == "stop")
        expected = forced(small, prompt, images, said)
        assert [score.token for score in scored] == said
        for score, row in zip(scored, expected):
            best, ids = row.topk(3)
            assert abs(score.logprob - row[score.token]) < 1e-5
            assert [i for i, _ in score.likeliest] == ids.tolist()
            assert torch.allclose(torch.tensor([p for _, p in score.likeliest]), best, atol=1e-5)
    fast_answers(session, prompts, pictures, 2)
    assert session.scored == [[], [], []]                   # nobody asked this time
