import re
import sys
import textwrap

import pytest
import torch

import score_mods
from score_mods import available_masks, available_score_mods, check_mask, dense_mask, fingerprint, make_mask, mask_info
from score_mods.registry import FACTORIES, SCORE_FACTORIES
from tests.score_mods.catalogue import MASKS

IDS = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1, 1]])

USER_MODULE = """
    import torch

    def every_other(step=2):
        def keep(b, h, q_idx, kv_idx):
            return (kv_idx <= q_idx) & ((q_idx - kv_idx) % step == 0)
        return keep

    def from_table():
        table = torch.arange(16) // 4
        def keep(b, h, q_idx, kv_idx):
            return table[q_idx] == table[kv_idx]
        return keep

    def returns_none(): return None
    def returns_bool(): return True
    def returns_three(): return lambda q_idx, kv_idx, h: kv_idx <= q_idx
    def returns_score_mod(): return lambda score, b, h, q_idx, kv_idx: score
    def returns_starred(): return lambda *args: args[3] <= args[2]
    def returns_float(): return lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx).float()
    def returns_python_bool(): return lambda b, h, q_idx, kv_idx: True
    def returns_grid(): return lambda b, h, q_idx, kv_idx: torch.ones(4, 4, dtype=torch.bool)
    def branches(): return lambda b, h, q_idx, kv_idx: (kv_idx if q_idx > kv_idx else q_idx) == 0
    def fails_inside(): return lambda b, h, q_idx, kv_idx: undefined_name <= q_idx
    def fails(): raise KeyError("no such table")
    def typed(window): return [0] * window and every_other(window)

    def false_info():
        from score_mods import MaskInfo, describe
        return describe(lambda b, h, q_idx, kv_idx: kv_idx <= q_idx, MaskInfo(name="x", window=3, causal=True))

    def false_exact():
        from score_mods import MaskInfo, describe
        return describe(lambda b, h, q_idx, kv_idx: kv_idx == q_idx, MaskInfo(name="x", causal=True, exact=True))

    number = 3
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A folder on the path with a user's modules: good, wrong, and impossible to import."""
    modules = {
        "user_masks": USER_MODULE,
        "user_missing": "\n\nimport no_such_dependency",
        "user_attribute": "import torch\ntorch.no_such_thing",
        "user_syntax": "def broken(:\n    pass",
        "user_exits": "raise RuntimeError('not on\\n a Tuesday')",
    }
    for name, text in modules.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in modules:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", available_masks())
def test_a_name_makes_the_mask_of_its_factory(name):
    args = {"document": {"document_ids": IDS}} | {case.name: case.args for case in MASKS.values()}
    args = args[name]
    mask = make_mask(name, **args)
    assert fingerprint(mask) == fingerprint(getattr(score_mods, name)(**args))
    assert mask_info(mask).name == name


@pytest.mark.parametrize("name", available_masks())
def test_every_factory_states_its_law(name):
    assert FACTORIES[name].__doc__.startswith("Keep ")


@pytest.mark.parametrize("name", available_score_mods())
def test_every_score_mod_states_its_law(name):
    assert SCORE_FACTORIES[name].__doc__.startswith("Score ")


@pytest.mark.parametrize("folder", ["masks", "mods"])
def test_one_file_each(folder):
    """A mask or score mod is defined in the file of its name."""
    factories = {"masks": FACTORIES, "mods": SCORE_FACTORIES}[folder]
    for name, factory in factories.items():
        assert factory.__module__ == f"score_mods.{folder}.{name}"


def test_a_users_factory_is_imported(user):
    mask = make_mask("user_masks:every_other", step=3)
    assert dense_mask(mask, q_len=4, kv_len=4, device="cpu")[0, 0].int().tolist() == [
        [1, 0, 0, 0],
        [0, 1, 0, 0],
        [0, 0, 1, 0],
        [1, 0, 0, 1],
    ]
    make_mask("user_masks:from_table")


UNKNOWN = {
    "typo": (
        "sliding_windw",
        "unknown mask 'sliding_windw' (did you mean 'sliding_window'?): known are attention_sink, causal, chunked",
    ),
    "nothing like it": ("zebra", "unknown mask 'zebra': known are attention_sink, causal, chunked"),
    "no string": (3, "a mask is named by a string, got 3 (int)"),
    "no factory": ("user_masks:", "a mask of your own is named \"package.module:factory\", got 'user_masks:'"),
    "no module": (":every_other", "a mask of your own is named"),
}


@pytest.mark.parametrize(("name", "message"), UNKNOWN.values(), ids=UNKNOWN.keys())
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mask(name)


IMPORTS = {
    "no such module": ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
    "an import inside it": (
        "user_missing:f",
        r"import 'user_missing': ModuleNotFoundError: No module named 'no_such_dependency' \(.*missing.py, line 3\)",
    ),
    "an attribute inside it": ("user_attribute:f", r"AttributeError: .*no_such_thing.*user_attribute.py, line 2"),
    "its syntax": ("user_syntax:f", r"SyntaxError: .*user_syntax.py, line 1"),
    "its own error": ("user_exits:f", r"RuntimeError: not on a Tuesday \(.*user_exits.py, line 1\)"),
    "no such factory": (
        "user_masks:every_othr",
        r"AttributeError: module 'user_masks' has no attribute 'every_othr' \(did you mean 'every_other'\?\)",
    ),
    "no function": ("user_masks:number", "must be a function that returns a mask, got 3"),
}


@pytest.mark.parametrize(("name", "message"), IMPORTS.values(), ids=IMPORTS.keys())
def test_factories_that_cannot_be_imported(user, name, message):
    with pytest.raises(ValueError, match=message) as raised:
        make_mask(name)
    assert "\n" not in str(raised.value)


WRONG = {
    "None": ("returns_none", r"returned the wrong thing: a mask is a function of \(b, h, q_idx, kv_idx\) .* got None"),
    "a bool": ("returns_bool", "got True"),
    "three arguments": ("returns_three", r"got <lambda>\(q_idx, kv_idx, h\)"),
    "a score mod": (
        "returns_score_mod",
        r"got <lambda>\(score, b, h, q_idx, kv_idx\) \(five arguments make a score mod",
    ),
    "any arguments": ("returns_starred", r"got <lambda>\(\*args\)"),
    "float": ("returns_float", "a mask returns a boolean tensor, got torch.float32"),
    "Python's bool": ("returns_python_bool", r"a mask returns a boolean tensor, got True \(bool\)"),
    "a grid": ("returns_grid", r"one bool for one query and key, got shape \(4, 4\)"),
    "control flow": (
        "branches",
        "it fails for the first 8 queries and keys: RuntimeError: .*data-dependent control flow",
    ),
    "an error inside": (
        "fails_inside",
        r"NameError: name 'undefined_name' is not defined \(.*user_masks.py, line \d+\)",
    ),
    "false bounds": ("false_info", r"its info \(causal=True, window=3, .*\) is false, it keeps key 0 for query 4"),
    "false law": ("false_exact", "is false, it leaves out key 0 for query 1"),
}


@pytest.mark.parametrize(("factory", "message"), WRONG.values(), ids=WRONG.keys())
def test_factories_that_return_the_wrong_thing(user, factory, message):
    with pytest.raises(ValueError, match=message) as raised:
        make_mask(f"user_masks:{factory}")
    assert str(raised.value).startswith(f"mask 'user_masks:{factory}' returned the wrong thing: ")


ARGUMENTS = {
    "negative": (
        "sliding_window",
        {"window": -1},
        "mask 'sliding_window': window must be >= 0 (previous keys a query sees besides itself), got -1",
    ),
    "bool": ("sliding_window", {"window": True}, "window must be a whole number"),
    "text": ("sliding_window", {"window": "512"}, "got '512' (str)"),
    "missing": (
        "sliding_window",
        {},
        "mask 'sliding_window' takes window: int, given no arguments: missing a required argument: 'window'",
    ),
    "typo": (
        "sliding_window",
        {"widow": 3},
        "given widow=3: missing a required argument: 'window' (did you mean 'window'?)",
    ),
    "too many": (
        "causal",
        {"window": 3},
        "mask 'causal' takes no arguments, given window=3: got an unexpected keyword",
    ),
    "tensors by shape": ("document", {"document_ids": IDS, "n": 1}, "given document_ids=tensor(2, 9), n=1: got an"),
    "a user's": ("user_masks:every_other", {"stride": 3}, "takes step=2, given stride=3: got an unexpected keyword"),
    "a user's error": ("user_masks:fails", {}, "failed for no arguments: KeyError: 'no such table' ("),
    "a user's type": ("user_masks:typed", {"window": "4"}, "failed for window='4': TypeError: can't multiply sequence"),
}


@pytest.mark.parametrize(("name", "args", "message"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_arguments_that_do_not_fit(user, name, args, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mask(name, **args)


def test_an_argument_may_be_called_name(user):
    (user / "user_named.py").write_text("def f(name):\n    return lambda b, h, q, k: k <= q\n")
    make_mask("user_named:f", name="x")


def test_check_mask_takes_short_documents():
    for length in (1, 2, 9):
        check_mask(score_mods.all_of(score_mods.causal(), score_mods.document(IDS[:, :length])))
