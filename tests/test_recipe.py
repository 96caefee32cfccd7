"""Recipes: reading, refusing with place and nearest name, including, guarding, and what is decided at each site."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from reattend.compiler.decisions import decide
from reattend.compiler.recipe import KEEP, Choice, Recipe, Split, guard
from reattend.compiler.recipe_load import load_recipe, shipped
from reattend.compiler.refusal import Refused
from reattend.compiler.vocabulary import STAGES, Knob, MechanismFacts, Vocabulary


def words(*facts):
    return Vocabulary({one.name: one for one in facts})


WORDS = words(
    MechanismFacts("softmax", "core"),
    MechanismFacts("window", "core", {"window": Knob("int", 1024), "sinks": Knob("int", 4)}),
    MechanismFacts("linear", "core", {"feature": Knob("Literal['elu', 'relu']", "elu"), "eps": Knob(float, 1e-6)}),
    MechanismFacts("agent", "core", {"agent_num": Knob("int", 49), "pool": Knob("tuple[int, int] | None", None)}),
    MechanismFacts("poolformer", "region", {"pool": Knob("int", 3)}),
    MechanismFacts("moh", "gate", {"shared_heads": Knob("int"), "routed_heads": Knob("int")}),
    MechanismFacts("int4", "cache", {"kv_group_size": Knob("int", 128)}),
    MechanismFacts("adapter", "insert", {"options": Knob("dict[str, float]", {})}),
    MechanismFacts("tome_like", "model", {"r": Knob("int", 8)}),
    MechanismFacts("group_heads", "model", {"groups": Knob("int", 2)}, stage="weights"),
    MechanismFacts("w8a8", "model", stage="quantize"),
)


@dataclass(frozen=True)
class At:
    path: str
    index: int
    heads: int = 8
    kv_heads: int = 2
    dim: int = 64
    pattern: str = "causal-self"
    features: frozenset[str] = frozenset()


LLAMA = [At(f"model.layers.{n}.self_attn", n) for n in range(6)]

FULL = """\
version: 1
model: {type: llama, layers: 32}
data: {calibrate: calib.jsonl, verify: heldout.jsonl, length: 8192, samples: 32}
sites:                                            # first match wins
  - {match: {layer: "0-1"}, attention: keep}
  - match: {layer: "2-31", kind: causal-self}
    attention: {window: {window: 1024, sinks: 4}}
    heads: {moh: {shared_heads: 2, routed_heads: 4}}
    kv: {int4: {kv_group_size: 128}}
    drop: [bias]
passes: [{tome_like: {r: 16}}]
quantize: {lm_head: keep, "*": w8a8}
verify: {max_kl: 0.05, min_top1: 0.97, else: rollback}
recover: {train: new, steps: 2000, lr: 1.0e-3}
target: cpu
"""

CANONICAL = """\
version: 1
model: {layers: 32, type: llama}
data: {calibrate: calib.jsonl, verify: heldout.jsonl, length: 8192, samples: 32}
sites:
  - match: {layer: 0-1}
    attention: keep
  - match: {kind: causal-self, layer: 2-31}
    attention: {window: {sinks: 4, window: 1024}}
    heads: {moh: {routed_heads: 4, shared_heads: 2}}
    kv: {int4: {kv_group_size: 128}}
    drop: [bias]
passes:
  - tome_like: {r: 16}
quantize: {lm_head: keep, "*": w8a8}
verify: {max_kl: 0.05, min_top1: 0.97}
recover: {steps: 2000}
target: cpu
"""


def rule(text, **more):
    """A recipe of one rule in flow style; the rule starts at 3:5."""
    return f"version: 1\nsites:\n  - {{match: '*', {text}}}\n" + "".join(f"{k}: {v}\n" for k, v in more.items())


def test_a_full_recipe_reads_and_prints_canonically():
    recipe = load_recipe(FULL, WORDS)
    assert recipe.text() == str(recipe) == CANONICAL
    assert dict(recipe.rules[1].decides)["attention"] == Choice("window", (("sinks", 4), ("window", 1024)))
    assert recipe.rules[1].drop == {"bias"}
    assert [rule.where for rule in recipe.rules] == ["recipe:5", "recipe:6"]
    assert recipe.verify.bounds == {"max_kl": 0.05, "min_top1": 0.97}
    assert recipe.verify.needs_data == ("max_kl", "min_top1")
    assert recipe.quantized("lm_head") == KEEP
    assert recipe.quantized("model.layers.0.mlp.up_proj") == Choice("w8a8")


def test_yaml_json_dict_and_recipe_are_the_same(tmp_path):
    recipe = load_recipe(FULL, WORDS)
    file = tmp_path / "recipe.yaml"
    file.write_text(FULL)
    table = recipe.to_dict()
    same = [file, str(file), CANONICAL, table, json.dumps(table), json.dumps(table, indent="\t"), recipe]
    for source in same:
        again = load_recipe(source, WORDS)
        assert again == recipe
        assert hash(again) == hash(recipe)
        assert again.digest == recipe.digest
    assert load_recipe(file, WORDS).rules[0].where == f"{file}:5"
    assert load_recipe(table, WORDS).rules[0].where == "sites[0]"
    assert load_recipe(recipe, WORDS) is recipe
    assert load_recipe(FULL.replace("2000", "2001"), WORDS).digest != recipe.digest


def test_a_recipe_value_is_checked_like_any_other():
    with pytest.raises(Refused, match="mechanism 'window': attention takes keep or: none"):
        load_recipe(
            Recipe(passes=(), rules=load_recipe(rule("attention: window"), WORDS).rules), words()
        )  # unknown here
    with pytest.raises(Refused, match="did you mean 'triton'"):
        load_recipe(Recipe(target="trito"), WORDS)


def test_sugar():
    def attention(text):
        return dict(load_recipe(rule(text), WORDS).rules[0].decides)["attention"]

    assert attention("attention: window") == attention("attention: {window: {}}") == attention("attention: {window: }")
    assert attention("attention: {window: {window: 6.4e+1}}").settings == {"window": 64}
    assert attention("attention: {linear: {eps: 1}}").settings == {"eps": 1.0}
    assert attention("attention: {agent: {pool: [7, 7]}}").settings == {"pool": (7, 7)}
    assert attention("attention: {agent: {pool: null}}").settings == {"pool": None}
    assert attention("attention: keep") is KEEP
    split = Split((("0-3", Choice("window")), ("rest", Choice("softmax"))))
    assert attention("split: {rest: softmax, 0-3: window}") == split
    assert attention("attention: {split: {0-3: {window: {}}, rest: softmax}}") == split
    assert load_recipe("version: 1\nquantize: w8a8\n", WORDS).quantize == (("*", Choice("w8a8")),)


def test_knobs_are_frozen_all_the_way_down():
    recipe = load_recipe(rule("insert: {adapter: {options: {b: 2, a: 1.5}}}"), WORDS)
    choice = dict(recipe.rules[0].decides)["insert"]
    assert hash(choice) == hash(dict(load_recipe(recipe.to_dict(), WORDS).rules[0].decides)["insert"])
    assert choice.settings == {"options": {"a": 1.5, "b": 2.0}}
    assert str(choice) == "adapter(options={'a': 1.5, 'b': 2.0})"


REFUSED = [
    ("version: 2\n", "recipe:1:10: version: found 2: known versions: 1"),
    ("version: true\n", "recipe:1:10: version: found true"),
    ("sites: []\n", "recipe:1:1: a recipe without version: write `version: 1`"),
    ("- a\n", "recipe:1:1: a recipe is a list of 1"),
    ("just words\n", "recipe:1:1: a recipe is 'just words'"),
    ("version: 1\nsite: []\n", "recipe:2:1: site: key 'site': did you mean 'sites'?"),
    ("version: 1\nsites: {a: b}\n", "recipe:2:8: sites: a mapping (a): expected a list"),
    ("version: 1\nsites: [3]\n", "recipe:2:9: sites[0]: a rule is 3"),
    ("version: 1\nsites:\n  - {attention: keep}\n", "recipe:3:5: sites[0]: a rule without `match`"),
    (
        "version: 1\nsites:\n  - {match: {}, attention: keep}\n",
        "recipe:3:13: sites[0].match: match is a mapping (empty)",
    ),
    (
        "version: 1\nsites:\n  - {match: {layr: 3}, attention: keep}\n",
        "recipe:3:14: sites[0].match.layr: key 'layr': did you mean 'layer'?",
    ),
    (
        "version: 1\nsites:\n  - {match: 'l.[0-15].*', attention: keep}\n",
        "recipe:3:13: sites[0].match: '[' in a path: [0-15] is a set of characters (it means 0, 1 and 5): write",
    ),
    (rule("drop: [bias]"), "recipe:3:5: sites[0]: a rule that decides nothing"),
    (rule("atention: window"), "recipe:3:18: sites[0].atention: key 'atention': did you mean 'attention'?"),
    (rule("attention: windw"), "recipe:3:29: sites[0].attention: mechanism 'windw': did you mean 'window'?"),
    (
        rule("attention: {windw: {}}"),
        "recipe:3:30: sites[0].attention.windw: mechanism 'windw': did you mean 'window'?",
    ),
    (
        rule("attention: {window: {windw: 3}}"),
        "recipe:3:39: sites[0].attention.window.windw: knob 'windw': did you mean",
    ),
    (rule("attention: {softmax: {a: 3}}"), "sites[0].attention.softmax.a: knob 'a': knobs of softmax: none"),
    (
        rule("attention: {window: {window: big}}"),
        "recipe:3:47: sites[0].attention.window.window: found 'big': expected a",
    ),
    (rule("attention: {window: {window: 1.5}}"), "found 1.5: expected a whole number"),
    (rule("attention: {window: {window: true}}"), "found true: expected a whole number"),
    (rule("attention: {window: {window: .inf}}"), "found inf: expected a whole number"),
    (rule("attention: {window: 3}"), "recipe:3:38: sites[0].attention.window: 3: expected a mapping of window, sinks"),
    (rule("attention: {linear: {feature: elo}}"), "found 'elo': expected one of elu, relu"),
    (
        rule("attention: {agent: {pool: [7]}}"),
        "found a list of 1: expected a list of 2 (a whole number, a whole number)",
    ),
    (rule("attention: [window]"), "recipe:3:29: sites[0].attention: a list of 1: expected keep, a mechanism"),
    (rule("attention: {window: {}, linear: {}}"), "a mapping (window, linear): expected keep, a mechanism"),
    (rule("attention: null"), "sites[0].attention: nothing (null)"),
    (rule("attention: int4"), "'int4' is a cache mechanism: it stands under `kv`"),
    (
        rule("kv: {window: {}}"),
        "recipe:3:23: sites[0].kv.window: 'window' is a core mechanism: it stands under `attention`",
    ),
    (rule("heads: moh"), "sites[0].heads: moh without shared_heads, routed_heads"),
    (rule("heads: {split: {0: moh}}"), 'key 0 is no text: write it in quotes: "0"'),
    (rule("heads: {split: {'0': moh}}"), "split under heads: only attention is split"),
    (rule("split: {0-3: poolformer, rest: keep}"), "'poolformer' is no core mechanism: only cores are split"),
    (rule("split: {0-3: window, 3-4: window}"), "recipe:3:39: sites[0].split.3-4: heads [3] twice"),
    (rule("split: {all: window}"), "sites[0].split.all: heads 'all': expected \"0-3\""),
    (rule("split: {}"), "sites[0].split: a mapping (empty)"),
    (rule("split: {rest: window}, attention: keep"), "attention and split at once"),
    (rule("attention: keep, drop: [bais]"), "sites[0].drop[0]: feature 'bais': did you mean 'bias'?"),
    (rule("attention: keep, drop: bias"), "sites[0].drop: 'bias': expected a list"),
    ("version: 1\npasses: [keep]\n", "passes[0]: keep: a pass that is not wanted is not listed"),
    ("version: 1\npasses: [w8a8]\n", "it stands under `quantize`"),
    ("version: 1\nquantize: {'*': w8a8, lm_head: keep}\n", "recipe:2:23: quantize.lm_head: 'lm_head' stands after '*'"),
    ("version: 1\nquantize: {'a[0]': w8a8}\n", "'[' in a path"),
    ("version: 1\nverify: {max_kll: 1}\n", "recipe:2:10: verify.max_kll: key 'max_kll': did you mean 'max_kl'?"),
    ("version: 1\nverify: {max_kl: -1}\n", "verify.max_kl: found -1.0: expected at least 0"),
    ("version: 1\nverify: {min_top1: 97}\n", "found 97.0: expected at least 0, at most 1"),
    ("version: 1\nverify: {else: rolback}\n", "verify.else: found 'rolback': expected one of rollback, refuse, warn"),
    ("version: 1\ndata: {length: 0}\n", "data.length: found 0: expected at least 1"),
    ("version: 1\ndata: calib.jsonl\n", "recipe:2:7: data: `data` is 'calib.jsonl': expected a mapping of calibrate"),
    ("version: 1\nrecover: {steps: many}\n", "recover.steps: found 'many': expected a whole number"),
    ("version: 1\nmodel: llama\n", "model: 'llama': expected facts"),
    ("version: 1\nmodel: {type: null}\n", "model.type: nothing (null)"),
    ("version: 1\ntarget: tritn\n", "target: target 'tritn': did you mean 'triton'?"),
    ("version: 1\ninclude: [nope.yaml]\n", "recipe:2:11: include[0]: nope.yaml: no such file"),
    ("version: 1\ninclude: [[a]]\n", "include[0]: a list of 1"),
]


@pytest.mark.parametrize(
    ("text", "says"), REFUSED, ids=[text.partition("\n")[2].strip() or text for text, _ in REFUSED]
)
def test_a_mistake_is_refused_with_place_key_and_what_fits(text, says):
    with pytest.raises(Refused) as refused:
        load_recipe(text, WORDS)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("exat", "exat: no such file: did you mean 'exact'?"),
        ("no/such.yaml", "no/such.yaml: no such file"),
        (".", ".: is a folder"),
        ("/dev/zero", "/dev/zero: no regular file"),
        ("x" * 5000, "no file name"),
        ("a\0b", "a\0b: no"),
        (3, "a recipe given as int"),
        ({"version": 1, "sites": [{"match": "*", "attention": "windw"}]}, "sites[0].attention: mechanism 'windw'"),
        ({"version": 1, 2: 3}, "key 2 is no text"),
        ({"sites": []}, "recipe: a recipe without version"),
    ],
    ids=repr,
)
def test_a_source_that_is_no_recipe_is_refused(source, says):
    with pytest.raises(Refused) as refused:
        load_recipe(source, WORDS)
    assert says in str(refused.value)


def test_the_shipped_recipes_load_and_decide_something():
    assert set(shipped()) >= {"exact", "window", "linear", "agent"}
    vit = [At(f"blocks.{n}.attn", n, kv_heads=8, pattern="noncausal-self") for n in range(4)]
    for name in shipped():
        recipe = load_recipe(name, WORDS)
        assert decide(recipe, LLAMA).changes or decide(recipe, vit).changes
    assert load_recipe("exact", WORDS).rules[0].where == "recipes/exact.yaml:4"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("softmax", {"sites": [{"match": "*", "attention": {"softmax": {}}}]}),
        ("int4", {"sites": [{"match": "*", "kv": {"int4": {}}}]}),
        ("tome_like", {"passes": [{"tome_like": {}}]}),
        ("w8a8", {"quantize": {"*": {"w8a8": {}}}}),
    ],
)
def test_a_mechanisms_name_is_the_recipe_that_puts_it_wherever_it_belongs(name, wanted):
    assert load_recipe(name, WORDS).to_dict() == load_recipe({"version": 1, **wanted}, WORDS).to_dict()


def test_a_shipped_recipe_comes_before_a_mechanism_of_its_name():
    assert load_recipe("window", WORDS).source == "recipes/window.yaml"


def test_an_empty_recipe_is_a_warning():
    for source in ("\n", "# nothing\n", {}, "version: 1\n"):
        recipe = load_recipe(source, WORDS)
        assert recipe.empty
        assert len(decide(recipe, LLAMA).warnings) == 1


def test_a_guard_refuses_other_models():
    recipe = load_recipe("version: 1\nmodel: {type: [llama, qwen2], layers: 32}\n", WORDS)
    guard(recipe, {"type": "qwen2", "layers": 32, "heads": 8})
    with pytest.raises(Refused, match="made for layers 32, this model has 28"):
        guard(recipe, {"type": "llama", "layers": 28})
    with pytest.raises(Refused, match=r"model.layers: 32: known of this model: type"):
        guard(recipe, {"type": "llama"})


def files(folder, **texts):
    for name, text in texts.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".yaml").write_text("version: 1\n" + text)
    return folder / "own.yaml"


def test_included_rules_come_after_ones_own_and_settings_fill_in(tmp_path):
    own = files(
        tmp_path,
        own="include: [sub/other.yaml, exact]\nsites: [{match: {layer: 0}, attention: keep}]\n"
        "verify: {max_kl: 0.1}\nquantize: {lm_head: keep}\nmodel: {type: llama}\n",
        sub__other="include: [third.yaml]\nsites: [{match: '*', attention: window}]\nmodel: {layers: 6}\n"
        "verify: {max_kl: 9, min_top1: 0.5}\nquantize: {lm_head: w8a8, '*': w8a8}\ndata: {verify: v.jsonl}\n",
        sub__third="passes: [tome_like]\nrecover: {steps: 5}\ntarget: cpu\n",
    )
    recipe = load_recipe(own, WORDS)
    assert [rule.where for rule in recipe.rules] == [
        f"{own}:3",
        f"{tmp_path / 'sub/other.yaml'}:3",
        "recipes/exact.yaml:4",
    ]
    assert recipe.verify.bounds == {"max_error": 1e-4, "max_kl": 0.1, "min_top1": 0.5}
    assert recipe.quantize == (("lm_head", KEEP), ("*", Choice("w8a8")))
    assert recipe.model == (("layers", 6), ("type", "llama"))
    assert recipe.data.verify == "sub/v.jsonl"
    assert (recipe.passes, recipe.recover.steps, recipe.target) == ((Choice("tome_like"),), 5, "cpu")
    assert load_recipe(recipe.text(), WORDS) == recipe


def test_includes_that_go_in_circles_or_contradict_are_refused(tmp_path):
    own = files(tmp_path, own="include: [b.yaml]\n", b="include: [c.yaml]\n", c="include: [own.yaml]\n")
    with pytest.raises(Refused, match="circle: own.yaml -> b.yaml -> c.yaml -> own.yaml") as refused:
        load_recipe(own, WORDS)
    assert refused.value.where == f"{tmp_path / 'c.yaml'}:2:11: include[0]"
    own = files(tmp_path, own="include: [b.yaml]\nmodel: {layers: 3}\n", b="model: {layers: 4}\n")
    with pytest.raises(Refused, match="its guard says layers 4, here it is 3"):
        load_recipe(own, WORDS)
    deep = {f"d{n}": f"include: [d{n + 1}.yaml]\n" for n in range(12)}
    with pytest.raises(Refused, match="too many includes"):
        load_recipe(files(tmp_path, own="include: [d0.yaml]\n", **deep), WORDS)
    many = {f"m{n}": "" for n in range(80)}
    own = files(tmp_path, own=f"include: [{', '.join(f'{name}.yaml' for name in many)}]\n", **many)
    with pytest.raises(Refused, match="too many includes"):
        load_recipe(own, WORDS)


def test_a_file_included_on_two_ways_counts_once(tmp_path):
    own = files(
        tmp_path,
        own="include: [b.yaml, c.yaml]\n",
        b="include: [d.yaml]\n",
        c="include: [d.yaml]\n",
        d="passes: [tome_like]\nsites: [{match: '*', attention: window}]\n",
    )
    recipe = load_recipe(own, WORDS)
    assert (len(recipe.rules), len(recipe.passes)) == (1, 1)


TABLE = """\
site                      layer  attention          kv              rule
model.layers.0.self_attn  0      keep               int4 drop bias  recipe:3, recipe:4
model.layers.1.self_attn  1      linear drop bias   int4 drop bias  recipe:4
model.layers.2.self_attn  2      window(window=64)  -               recipe:5
model.layers.3.self_attn  3      window(window=64)  -               recipe:5
model.layers.4.self_attn  4      -                  -               -
model.layers.5.self_attn  5      -                  -               -"""


def test_the_first_match_per_key_decides():
    text = """\
version: 1
sites:
  - {match: {layer: 0}, attention: keep}
  - {match: {layer: 0-1}, attention: linear, kv: int4, drop: [bias]}
  - {match: {layer: 0-3}, attention: {window: {window: 64}}}
"""
    found = decide(load_recipe(text, WORDS), LLAMA)
    first = found["model.layers.0.self_attn"]
    assert (first.of("attention").wish, first.of("attention").where) == (KEEP, "recipe:3")
    assert (first.of("kv").wish, first.of("kv").drop) == (Choice("int4"), {"bias"})
    assert found["model.layers.1.self_attn"].of("attention").wish == Choice("linear")
    assert found["model.layers.3.self_attn"].of("attention").wish == Choice("window", (("window", 64),))
    assert found["model.layers.4.self_attn"].decided == ()
    assert not found.warnings
    assert [site.changes for site in found] == [True, True, True, True, False, False]
    assert str(found) == TABLE
    with pytest.raises(Refused, match="site 'lm_head': sites: model.layers.0.self_attn"):
        found["lm_head"]


@pytest.mark.parametrize(
    ("match", "says"),
    [
        ("{layer: 77}", "recipe:4: decides nothing: no site has layer 77 (there are 0 to 5)"),
        ("{stage: 0}", "no site has stage 0 (no path here tells a stage)"),
        ("'*.self_attn'", "(`*` stays within a segment: **.self_attn)"),
        ("encoder.*", "no site has path encoder.* (paths are like model.layers.0.self_attn)"),
        ("{kind: cross}", "no site has kind cross (there are causal-self)"),
        ("{heads: '>8'}", "no site has heads >8 (there are 8)"),
        ("{has: bias}", "no site has bias (features here: none)"),
        ("{part: vision}", "no site has part vision (paths are like"),
        ("{layer: 0, index: 5}", "no site meets all of {index: 5, layer: 0}"),
        ("{layer: 0-1}", "recipe:4: decides nothing: its 2 sites are taken by recipe:3"),
    ],
)
def test_a_rule_that_decides_nothing_is_a_warning_that_says_why(match, says):
    text = (
        "version: 1\nsites:\n  - {match: {layer: 0-2}, attention: keep}\n  - {match: "
        + match
        + ", attention: linear}\n"
    )
    (warning,) = decide(load_recipe(text, WORDS), LLAMA).warnings
    assert says in warning


def test_a_recipe_on_a_model_without_sites_warns():
    found = decide(load_recipe(rule("attention: window"), WORDS), [])
    assert found.warnings == ("recipe:3: decides nothing: the model has no sites",)
    assert not found.changes


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ("{0-3: window, rest: softmax}", None),
        ("{'4-7': window, '0-3': softmax}", None),
        ("{0-3: window}", "split leaves out heads [4, 5, 6, 7] of 8: add `rest: keep`"),
        ("{0-2: window, rest: keep}", "split takes heads [0, 1, 2] of 8 with 2 kv heads: whole groups of 4"),
        ("{0-11: window, rest: keep}", "split '0-11' of 8 heads: each of heads 0..7 in one part"),
        ("{0-7: window, rest: keep}", "split 'rest' of 8 heads"),
    ],
)
def test_a_split_takes_whole_kv_groups(split, says):
    found = decide(load_recipe(rule(f"split: {split}"), WORDS), LLAMA[:1])
    refusals = [str(refusal) for refusal in found.refusals]
    assert len(refusals) == (says is not None)
    assert all(says in text and text.startswith("model.layers.0.self_attn (recipe:3): ") for text in refusals)
    assert ("REFUSED" in str(found)) == (says is not None)


def test_a_split_names_the_heads_of_each_part():
    split = dict(load_recipe(rule("split: {'0,4-5': window, rest: keep}"), WORDS).rules[0].decides)["attention"]
    assert split.over(8, 8) == (((0, 4, 5), Choice("window")), ((1, 2, 3, 6, 7), KEEP))


def test_stages_are_fixed_and_every_key_has_one():
    assert STAGES == ("weights", "attention", "heads", "tokens", "insert", "kv", "quantize", "parallel", "lower")
    found = [WORDS.stage(key) for key in ("attention", "heads", "passes", "insert", "kv", "quantize", "target")]
    assert found == ["attention", "heads", "tokens", "insert", "kv", "quantize", "lower"]
    assert WORDS.stage("passes", "group_heads") == "weights"
    with pytest.raises(Refused, match="words of the recipe itself"):
        words(MechanismFacts("keep", "core"))
    with pytest.raises(Refused, match="stage 'later'"):
        words(MechanismFacts("x", "model", stage="later"))
