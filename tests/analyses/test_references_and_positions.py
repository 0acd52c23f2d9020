"""What ablations and circuits are measured against, and how heads, positions, seeds and sets may be given."""

import dataclasses

import numpy as np
import pytest
import torch

from fastinterp import Edit, ablate, activation_patch, circuit, intervene, path_patch
from fastinterp.analyses import replacements
from fastinterp.analyses.circuits import Circuit, faithfulness
from fastinterp.analyses.replacements import with_source
from fastinterp.errors import OptionError, PromptError, TokenRangeError
from fastinterp.prompts import PromptSet

TEXT = "When John and Mary went to the shops, John gave the bag to"
UNITS = [(0, 1), (1, 2)]
EXACT = 1e-9


@pytest.fixture(scope="module")
def model(zoo):
    return zoo.model("gpt2", dtype=torch.float64)


def of(*ids):
    return PromptSet.of(map(list, ids), answer=[[5]] * len(ids), wrong=[[6]] * len(ids))


PROMPTS = of((3, 5, 7), (4, 6, 8), (9, 11, 12, 1), (2, 2, 10, 13))


# The reference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_the_prompt_itself_as_reference_changes_nothing(model, bos):
    """Text of the reference begins with BOS where the prompts do."""
    tokens = PromptSet.of([TEXT], answer=[" Mary"], wrong=[" John"]).tokenize(model, prepend_bos=bos)
    for given in (tokens, PromptSet.of(tokens.tokens, answer=[" Mary"], wrong=[" John"])):
        options = dict(mode="mean", mean_over="pos", reference=PromptSet.of([TEXT]))
        effects = ablate(model, given, UNITS, **options)["logit_diff_mean_total"]
        assert float(np.abs(effects).max()) < EXACT
        found = circuit(model, given, UNITS, **options)
        assert float(np.abs(found["logit_diff_circuit"][:, 0] - found["logit_diff_clean"]).max()) < EXACT
        # The other one would have changed something.
        options["reference"] = options["reference"].tokenize(model, prepend_bos=not bos)
        if bos:
            with pytest.raises(OptionError, match="reference prompts have no token at position"):
                ablate(model, given, UNITS, **options)
        else:
            assert float(np.abs(ablate(model, given, UNITS, **options)["logit_diff_mean_total"]).max()) > 1e-3


def test_answers_of_the_reference_do_not_matter(model):
    texts = [TEXT, "Then Alice and Bob had"]
    answered = PromptSet.of(texts, answer=[" supercalifragilistic", None], corrupt=["When", None])
    for function, given in ((ablate, UNITS), (circuit, [UNITS])):
        one, other = (
            function(model, PROMPTS, given, mode="mean", reference=reference)
            for reference in (answered, PromptSet.of(texts))
        )
        assert one.identical(other)
    with pytest.raises(PromptError):
        answered.tokenize(model)


@pytest.fixture
def idle(model, monkeypatch):
    def run(*args, **kwargs):
        raise AssertionError("the model ran")

    monkeypatch.setattr(replacements, "run_blocks", run)
    return model


def test_a_short_reference_of_a_circuit_is_refused_before_the_model_runs(idle):
    options = dict(mode="mean", mean_over="pos")
    with pytest.raises(OptionError, match=r"no token at position 3, and a prompt has 4 tokens.*mean_over='tokens'"):
        circuit(idle, PROMPTS, [(0, 1)], reference=PromptSet.of([[1, 2, 3], [4]]), **options)
    with pytest.raises(AssertionError, match="the model ran"):
        circuit(idle, PROMPTS, [(0, 1)], reference=PromptSet.of([[1, 2, 3, 4]]), **options)


# Partners -----------------------------------------------------------------------------------------------------------


def test_a_partner_always_has_other_tokens(model):
    prompts = of((1, 2, 3), (7, 8, 9), (1, 2, 3), (1, 2, 3), (4, 5), (1, 2), (4, 5), (7, 8, 9), (3, 3, 3)).tokenize(
        model
    )
    drawn = set()
    for seed in range(8):
        corrupt = with_source(prompts, seed).corrupt
        for own, other in zip(prompts.tokens, corrupt, strict=True):
            assert len(own) == len(other)
            assert own.tolist() != other.tolist()
        drawn.add(tuple(map(tuple, (row.tolist() for row in corrupt))))
        # Equal prompts have the same one.
        assert corrupt[0].tolist() == corrupt[2].tolist() == corrupt[3].tolist()
    assert len(drawn) == 2
    effects = ablate(model, prompts, UNITS, mode="resample")["logit_diff_resample_total"]
    assert float(np.abs(effects).min()) > 1e-6


def test_different_prompts_are_drawn_as_a_shifted_random_order(model):
    prompts = of(*((i, i + 1, i + 2) for i in range(1, 12))).tokenize(model)
    for seed in (0, 5):
        order = np.random.default_rng(seed).permutation(np.arange(11))
        partner = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
        corrupt = with_source(prompts, seed).corrupt
        assert [row.tolist() for row in corrupt] == [prompts.tokens[partner[i]].tolist() for i in range(11)]


@pytest.mark.parametrize("function", [ablate, circuit])
def test_equal_prompts_are_no_partners(model, function):
    prompts = of((1, 2, 3), (4, 5), (1, 2, 3), (6, 7), (1, 2, 3))
    with pytest.raises(PromptError, match=r"all 3 prompts of 3 tokens are equal to prompt 0 \(id '0'\).*corrupt="):
        function(model, prompts, UNITS, mode="resample")


# Faithfulness -------------------------------------------------------------------------------------------------------


def test_faithfulness_is_the_ratio_whatever_its_sign(model):
    swapped = dataclasses.replace(PROMPTS, answer=PROMPTS.wrong, wrong=PROMPTS.answer)
    signs = set()
    for prompts in (PROMPTS, swapped):
        found = circuit(model, prompts, [[(0, 1), "MLP0"], []], mode="zero")
        nothing, whole, kept = (found[f"logit_diff_{name}"].mean("prompt") for name in ("nothing", "clean", "circuit"))
        np.testing.assert_allclose(found["faithfulness"], (kept - nothing) / (whole - nothing), atol=EXACT)
        signs.add(bool(whole > nothing))
    assert signs == {True, False}


def test_faithfulness_is_nan_where_the_model_is_no_other_than_nothing(model):
    """``top1`` of an answer that no run gives: 0 for the model and for nothing."""
    prompts = PromptSet.of(PROMPTS.prompts, answer=[[372]] * 4)
    found = circuit(model, prompts, [[(0, 1)], []], mode="zero", metric="top1")
    assert float(found["top1_clean"].sum()) == float(found["top1_nothing"].sum()) == 0
    assert np.isnan(found["faithfulness"].values).all()
    # Also where the set itself differs from both.
    nothing = found["top1_clean"] * 0
    for kept in (0.0, 1.0):
        changed = {"m_nothing": nothing, "m_clean": nothing, "m_circuit": found["top1_circuit"] * 0 + kept}
        assert np.isnan(faithfulness(changed, "m").values).all()


# Positions, heads, seeds and sets -----------------------------------------------------------------------------------

COLUMN = (0, 2, -1, 1)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("effect", ["total", "direct"])
def test_a_column_of_positions_may_be_an_array(model, effect):
    columns = (list(COLUMN), np.array(COLUMN), np.array(COLUMN, dtype=np.int16), torch.tensor(COLUMN))
    found = [ablate(model, PROMPTS, UNITS, pos=column, effect=effect, metric="loss") for column in columns]
    assert all(each.identical(found[0]) for each in found)
    assert float(np.abs(np.nan_to_num(found[0][f"loss_zero_{effect}"])).max()) > 1e-3
    edits = [Edit(site="z", layer=layer, head=head) for layer, head in UNITS]
    first, second = (intervene(model, PROMPTS, edits, metric="loss", pos=column) for column in columns[:2])
    assert first.identical(second)
    if effect == "total":
        np.testing.assert_allclose(first["loss_effect"].values, found[0]["loss_zero_total"].values, atol=EXACT)


@pytest.mark.usefixtures("without_shape_checks")
def test_bounds_of_a_slice_are_integers(model):
    one, other = (ablate(model, PROMPTS, UNITS, pos=slice(start, None)) for start in (1, np.int64(1)))
    assert one.identical(other)
    for pos in (slice(0.5, None), slice("1", None), np.array([0.0] * 4), np.array([True] * 4), [], [[0]] * 4):
        with pytest.raises(OptionError, match="one integer for each prompt"):
            ablate(model, PROMPTS, UNITS, pos=pos)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "units",
    [
        np.array(UNITS),
        torch.tensor(UNITS),
        [np.array(pair) for pair in UNITS],
        [(np.int64(layer), np.int32(head)) for layer, head in UNITS],
        [[0, 1], [1, 2]],
        (pair for pair in UNITS),
        ("L0H1", "L1H2"),
    ],
    ids=["array", "tensor", "rows", "numpy integers", "lists", "generator", "labels"],
)
def test_heads_may_be_given_in_many_ways(model, units):
    units = list(units) if isinstance(units, tuple) else units
    kept = np.argwhere(np.array([[0, 1, 0, 0], [0, 0, 1, 0]])) if isinstance(units, np.ndarray) else None
    assert ablate(model, PROMPTS, units).identical(ablate(model, PROMPTS, UNITS))
    if kept is not None:
        found = circuit(model, PROMPTS, kept, mode="zero")
        assert found["circuit"].values.tolist() == ["L0H1+L1H2"]


@pytest.mark.usefixtures("without_shape_checks")
def test_what_is_no_unit_is_named_as_it_was_given(model):
    for units, message in (
        ([(0, 1.5)], r"units has \(0, 1.5\)|units has 0"),
        (np.array([0, 1]), "units has 0"),
        ([(True, False)], "units has True"),
        (5, "units=5: give heads as"),
        ((), "units is empty"),
    ):
        with pytest.raises(OptionError, match=message):
            ablate(model, PROMPTS, units)


@pytest.mark.usefixtures("without_shape_checks")
def test_sources_of_paths_may_be_arrays_and_are_no_truth_values(model):
    pairs = dataclasses.replace(PROMPTS, corrupt=((3, 6, 7), (4, 6, 9), (9, 10, 12, 1), (2, 1, 10, 13)))
    first = path_patch(model, pairs, [(0, 1), (1, 2)])
    for sources in (np.array(UNITS), torch.tensor(UNITS), [np.array(pair) for pair in UNITS], [[0, 1], [1, 2]]):
        assert path_patch(model, pairs, sources).identical(first)
    assert path_patch(model, pairs, np.array([0, 1])).identical(path_patch(model, pairs, (0, 1)))
    for sources in ((True, False), [(True, False)], np.array([[0.0, 1.0]]), np.zeros((0, 2), dtype=int), [(0, 1, 2)]):
        with pytest.raises(OptionError, match="give a pair of layer and head"):
            path_patch(model, pairs, sources)


SETS = [[(0, 1), (0, 2)], [(1, 1), (1, 2)]]


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    "keep",
    [
        SETS,
        [((0, 1), (0, 2)), ((1, 1), (1, 2))],
        tuple(map(tuple, SETS)),
        np.array(SETS),
        [{(0, 1), (0, 2)}, frozenset({(1, 1), (1, 2)})],
        [[[0, 1], [0, 2]], [[1, 1], [1, 2]]],
        (pairs for pairs in SETS),
    ],
    ids=["lists", "tuples", "tuple of tuples", "array", "sets", "lists of lists", "generator"],
)
def test_several_sets_are_several_however_they_are_given(model, keep):
    found = circuit(model, PROMPTS, keep, mode="zero")
    assert found["circuit"].values.tolist() == ["L0H1+L0H2", "L1H1+L1H2"]
    assert found.identical(circuit(model, PROMPTS, SETS, mode="zero"))


@pytest.mark.usefixtures("without_shape_checks")
def test_sets_that_are_none_are_refused(model):
    for keep, message in (
        ("L0H1", r"keep='L0H1' is text: give a list of heads and MLPs such as \['L0H1'\]"),
        ("L0H1,L0H2", r"give a list of heads and MLPs such as \['L0H1', 'L0H2'\]"),
        (["L0H1+L0H2"], r"keep has 'L0H1\+L0H2': give every set as a list of its own, such as \[\['L0H1', 'L0H2'\]\]"),
        (["MLP0", [(0, 1), (0, 2)]], r"keep has 'MLP0' beside \(\(0, 1\), \(0, 2\)\): .* a list of them for each set"),
        (["L0"], "keep has 'L0'"),
        ([0, 1], "keep has 0"),
        (3, "keep=3: give heads as"),
    ):
        with pytest.raises(OptionError, match=message):
            circuit(model, PROMPTS, keep, mode="zero")


def test_the_cost_of_a_circuit_goes_with_its_sets_not_with_its_heads(model):
    parts = ((0, 1), (1, 2), "MLP0")
    flat, nested, two = (Circuit(keep=keep) for keep in (parts, (parts,), tuple(SETS)))
    assert flat.cost(model.spec, 10) == nested.cost(model.spec, 10) == 3 / 4 * two.cost(model.spec, 10)
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    many = Circuit(keep=tuple(heads * 4000))
    assert many.tokens_per_batch(model) == nested.tokens_per_batch(model) == 4096


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("function", [ablate, circuit])
def test_a_seed_is_an_integer(model, function):
    corrupt = [function(model, PROMPTS, UNITS, mode="resample", seed=seed) for seed in (1, np.int64(1))]
    assert corrupt[0].identical(corrupt[1])
    for seed in (-1, 1.5, "1", None, True):
        with pytest.raises(OptionError, match=r"seed=.*: give an integer from 0 on"):
            function(model, PROMPTS, UNITS, mode="resample", seed=seed)


# Attributes and ids -------------------------------------------------------------------------------------------------


def test_attributes_say_what_was_done_and_nothing_else(zoo):
    model = zoo.model("gpt2")
    for precision, clean in (("exact", "exact"), ("delta", "exact"), ("bf16", "bf16"), ("tf32", "tf32")):
        found = circuit(model, PROMPTS, UNITS, mode="zero", precision=precision)
        assert found["logit_diff_clean"].attrs["precision"] == clean
        assert found["logit_diff_circuit"].attrs["precision"] == precision
        assert "mean_over" not in found["logit_diff_circuit"].attrs
        effects = ablate(model, PROMPTS, UNITS, effect="both", precision=precision)
        assert effects["logit_diff_clean"].attrs["precision"] == clean
        np.testing.assert_array_equal(effects["logit_diff_clean"], found["logit_diff_clean"])
        direct = ablate(model, PROMPTS, UNITS, effect="direct", precision=precision)
        assert direct["logit_diff_clean"].attrs["precision"] == "exact"
    assert circuit(model, PROMPTS, UNITS, mode="mean")["logit_diff_nothing"].attrs["mean_over"] == "tokens"


def test_corrupt_prompts_of_a_larger_vocabulary_are_refused(zoo):
    small = zoo.model("gpt2")
    last = small.spec.d_vocab - 1
    given = PromptSet.of([[1, 2, 3]], corrupt=[[1, 2, last]], answer=[5], wrong=[6]).tokenize(small)
    activation_patch(small, given, "z", by="head")
    assert given.corrupt is not None
    outside = dataclasses.replace(given, corrupt=(given.corrupt[0] + np.array([0, 0, 1], dtype=np.int32),))
    with pytest.raises(TokenRangeError, match=f"token id {last + 1} is out of range"):
        activation_patch(small, outside, "z", by="head")
