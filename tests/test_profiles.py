"""Profiles: where they are found, what they fill in, where they keep out, what is refused, and how one is made."""

import copy
import dataclasses
import json
import os
import tomllib
from pathlib import Path

import pytest
import torch
from models import LAYERS, tiny
from tiny_chat import tiny_tokenizer
from transformers import AutoModelForCausalLM

import flexasl
from flexasl import profiles
from flexasl.calibrated import CalibratedFor
from flexasl.integrations.transformers.fingerprint import calibrated_for
from flexasl.profiles import FOUND, Profile
from flexasl.report import Report
from flexasl.tools.evaluation import evaluate, plan

ROOT = Path(__file__).parents[1]
SETTINGS = {"score_from": 1, "stages": [{"tokens": 0.4, "tau": 0.35, "min_layer": 1, "max_layer": 2}]}
SETTINGS |= {"min_layer": 3, "max_layer": 4, "tau": 0.55}
FILLED = SETTINGS | {"stages": (flexasl.Stage(tokens=0.4, tau=0.35, min_layer=1, max_layer=2),)}
FEW = {"tasks": ["needle"], "unseen": None, "samples": 1, "length": 330, "config": flexasl.ASLConfig(select_tokens=100)}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FLEXASL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(profiles, "SHIPPED", {})
    return tmp_path / "cache"


def data_for(model: CalibratedFor, **settings) -> dict:
    answers = {"full": 1.0, "default": 0.5, "chosen": 1.0}
    evidence = {"select_tokens": 256, "length": 1536, "seed": 0, "prompts": {"needle": 2}, "checked": {"uniform": 1}}
    evidence |= {"held": 1.0, "cost": 0.4, "waited": 0.0, "answers": answers, "costs": answers, "kept_default": False}
    scores = {"kernel_size": 17, "pooling": "phrase", "score_power": "max", "contrast": True, "select_on": "recent"}
    return {
        "format": 1,
        "model": dataclasses.asdict(model),
        "settings": SETTINGS | scores | settings,
        "evidence": evidence | {"versions": {"flexasl": "0.1.0"}},
    }


def profile_of(model, **settings) -> Profile:
    return Profile.from_dict("Tiny", data_for(calibrated_for(model), **settings))


@pytest.fixture
def known() -> Path:
    """The file of the stored profile of the tiny Llama."""
    return profiles.store(profile_of(tiny("llama")))


def settings_on(model, config=None, policy="asl", **how):
    with flexasl.patch(model, config, policy=policy, **how) as patch:
        return {name: getattr(patch.config, name) for name in FOUND}, patch.profile


# What it fills in.


def test_a_profile_fills_in_what_is_open(known: Path) -> None:
    named = f"{known.stem} ({known})"
    assert settings_on(tiny("llama")) == (FILLED, named)
    assert settings_on(tiny("llama"), policy="asl_two_pass") == (FILLED | {"stages": ()}, named), "it has none"
    assert settings_on(tiny("qwen2"))[1] is None, "another model"
    assert settings_on(tiny("llama"), profile=False) == settings_on(
        tiny("llama"), flexasl.ASLConfig(tau=0.2), profile=False
    )


def test_what_the_user_gives_wins(known: Path) -> None:
    given, name = settings_on(tiny("llama"), flexasl.ASLConfig(tau=0.2, stages="none"))
    assert given == FILLED | {"tau": 0.2, "stages": ()} and name is not None
    every = {"min_layer": 2, "max_layer": 5, "tau": 0.1, "score_from": 0, "stages": ()}
    assert settings_on(tiny("llama"), flexasl.ASLConfig(**every)) == (every, None)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    "config",
    [
        flexasl.ASLConfig.paper(),
        flexasl.ASLConfig(settled_by="variance"),
        flexasl.ASLConfig(variance_reference="initial"),
        flexasl.ASLConfig(observe_layers=3),
        flexasl.ASLConfig(select_on="last"),
        flexasl.ASLConfig(score_power=1),
        flexasl.ASLConfig(contrast=False),
        flexasl.ASLConfig(max_layer=2),
        flexasl.ASLConfig(min_layer=5),
        flexasl.ASLConfig(score_from=2),
        flexasl.ASLConfig(stages="0.5@0"),
        flexasl.ASLConfig(calibrated_for=calibrated_for(tiny("llama"))),
    ],
)
def test_where_a_profile_keeps_out(config) -> None:
    found, name = settings_on(tiny("llama"), config)
    plain = config.resolve(LAYERS)
    assert (found, name) == ({setting: getattr(plain, setting) for setting in FOUND}, None)


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("policy", ["fixed_layer", "gemfilter", "snapkv", "full"])
def test_other_policies_take_none(policy: str) -> None:
    assert settings_on(tiny("llama"), policy=policy)[1] is None


def test_settings_that_are_set_later_are_filled_in_too(known: Path) -> None:
    with flexasl.patch(tiny("llama"), flexasl.ASLConfig.paper()) as patch:
        assert patch.profile is None
        patch.config = flexasl.ASLConfig(max_layer=5)
        assert (patch.config.max_layer, patch.config.tau) == (5, 0.55) and str(known) in patch.profile


@pytest.mark.usefixtures("known")
def test_the_report_names_it() -> None:
    config = flexasl.ASLConfig(select_tokens=24, window=8)
    reports = []
    for chosen in (config, config.replace(settled_by="variance")):
        with flexasl.patch(tiny("llama"), chosen) as patch, torch.no_grad():
            tiny("llama")(torch.arange(3, 63)[None])
        reports.append(patch.report)
    with_one, without = reports
    assert with_one.profile.startswith("llama-") and f"left open: profile {with_one.profile}" in str(with_one)
    assert without.profile is None and "profile" not in str(without)
    data = json.loads(json.dumps(with_one.to_dict()))
    assert Report.from_dict(data) == with_one
    del data["profile"]
    assert Report.from_dict(data).profile is None, "a report of before"
    assert Report.from_dict(data | {"preset": "Tiny"}).profile == "Tiny"


# Where it is found.


def test_one_that_is_given_comes_before_one_of_the_library_and_that_before_a_stored_one(
    known: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny("llama")
    monkeypatch.setattr(profiles, "FOLDER", tmp_path)
    monkeypatch.setitem(profiles.SHIPPED, "Tiny-Chat", ("llama", LAYERS, 64))
    profile_of(model, tau=0.6).save(tmp_path / "Tiny-Chat.json")
    profile_of(model, tau=0.7).save(tmp_path / "mine.profile.json")
    given = settings_on(model, profile=tmp_path / "mine.profile.json")
    assert (given[0]["tau"], given[1]) == (0.7, f"mine ({tmp_path / 'mine.profile.json'})")
    shipped = settings_on(model)
    assert (shipped[0]["tau"], shipped[1]) == (0.6, "Tiny-Chat (comes with flexasl)")
    profile_of(other_weights(model), tau=0.6).save(tmp_path / "Tiny-Chat.json")
    assert settings_on(model)[0]["tau"] == 0.55, "the library has one of the same shape, with other weights"


def other_weights(model):
    other = copy.deepcopy(model)
    other.lm_head.weight.data *= 1.1
    return other


def test_weights_in_another_dtype_are_known_by_the_librarys_but_have_their_own_file(
    monkeypatch: pytest.MonkeyPatch, known: Path, tmp_path: Path
) -> None:
    half = copy.deepcopy(tiny("llama")).to(torch.bfloat16)
    assert settings_on(half)[1] is None
    monkeypatch.setattr(profiles, "FOLDER", tmp_path)
    monkeypatch.setitem(profiles.SHIPPED, "Tiny", ("llama", LAYERS, 64))
    profile_of(tiny("llama")).save(tmp_path / "Tiny.json")
    assert settings_on(half)[1] is None, "of the same shape, but nothing says that it is this model"
    half.name_or_path = "owner/tiny"
    assert settings_on(half)[1] == "Tiny (comes with flexasl)"


def test_where_none_is_found_the_disk_is_asked_once(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    model, asked = calibrated_for(tiny("llama")), []
    plain = os.stat
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda path, *more, **how: (asked.append(path), plain(path, *more, **how))[1])
        for name in ("open", "scandir", "listdir", "mkdir"):
            patched.setattr(os, name, None)
        assert profiles.find(model) is None
    assert list(map(str, asked)) == [str(profiles.path_for(model))] and not cache.exists()


def test_folders_that_cannot_be_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path, *more, **how):
        raise PermissionError(13, "Permission denied", str(path))

    model = calibrated_for(tiny("llama"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", denied)
        assert profiles.find(model) is None
    path = profiles.store(profile_of(tiny("llama")))
    with monkeypatch.context() as patched:
        patched.setattr("flexasl.stored.open", denied, raising=False)
        with pytest.raises(flexasl.ConfigError, match=rf"{path.name} cannot be read \(Permission denied\); remove"):
            profiles.find(model)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FLEXASL_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert profiles.find(model) is None
    with pytest.raises(flexasl.FlexASLError, match="the user has no home folder; set FLEXASL_CACHE_DIR to a writable"):
        profiles.place_for(model)


def test_a_model_without_a_digest_is_not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = dataclasses.replace(calibrated_for(tiny("llama")), weights=None)
    assert profiles.path_for(unknown) is None and profiles.find(unknown) is None
    with pytest.raises(flexasl.FlexASLError, match="have no digest to store a profile under; give a file to write"):
        profiles.store(Profile.from_dict("Tiny", data_for(unknown)))


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert profiles.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("FLEXASL_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profiles.cache_folder() == tmp_path / "flexasl"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert profiles.cache_folder() == tmp_path / ".cache" / "flexasl"
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLEXASL_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(flexasl.FlexASLError, match=r"cannot be made .*; set FLEXASL_CACHE_DIR to a writable folder"):
        profiles.store(profile_of(tiny("llama")))


# What is refused.


def changed(data: dict, *path: str, to=None, drop: bool = False) -> dict:
    data = copy.deepcopy(data)
    place = data
    for name in path[:-1]:
        place = place[name]
    if drop:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return data


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: changed(data, "more", to=1), "more is not known; the fields of"),
        (lambda data: changed(data, "format", to=2), "format is 2, where 1 is needed"),
        (lambda data: changed(data, "evidence", drop=True), "evidence is missing"),
        (lambda data: changed(data, "settings", "window", to=32), "settings.window is not known"),
        (lambda data: changed(data, "settings", "tau", drop=True), "settings.tau is missing"),
        (lambda data: changed(data, "settings", "tau", to="half"), "settings.tau is 'half', where a number is needed"),
        (lambda data: changed(data, "settings", "tau", to=2), "tau=2.0 is out of range"),
        (lambda data: changed(data, "settings", "max_layer", to=2), "max_layer=2 comes before min_layer=3"),
        (lambda data: changed(data, "settings", "max_layer", to=9), "max_layer=9 is beyond the model"),
        (lambda data: changed(data, "settings", "stages", to=[{"tokens": 0.5}]), "is missing"),
        (lambda data: changed(data, "model", "num_layers", to="6"), "model.num_layers is '6'"),
        (lambda data: changed(data, "model", "family", to="x"), "model.family is not known"),
        (lambda data: changed(data, "evidence", "held", to=1.5), "evidence.held is 1.5"),
        (lambda data: changed(data, "evidence", "who", to="me"), "evidence.who is not known"),
        (lambda data: [data], "it is a list"),
    ],
)
def test_a_file_that_is_no_profile(change, words: str, tmp_path: Path) -> None:
    path, model = tmp_path / "own.json", tiny("llama")
    path.write_text(json.dumps(change(data_for(calibrated_for(model)))))
    with pytest.raises(flexasl.ConfigError) as error:
        flexasl.patch(model, profile=path)
    assert str(error.value).startswith(f"{path} holds no profile: ") and words in str(error.value), error.value
    assert "\n" not in str(error.value) and not hasattr(model, "flexasl_patch")


def test_files_that_are_none_at_all(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text("{")
    for path, error, words in (
        (tmp_path / "own.json", flexasl.ConfigError, "own.json holds no profile: it is not JSON"),
        (tmp_path, flexasl.ConfigError, "holds no profile: it is a folder"),
        (tmp_path / "none.json", FileNotFoundError, "none.json does not exist"),
        (3, flexasl.FlexASLError, "profile=3 is an int; give a path"),
        (True, flexasl.FlexASLError, "profile=True is a bool; give a path"),
        (0, flexasl.FlexASLError, "profile=0 is an int; give a path"),
    ):
        with pytest.raises(error, match=words):
            flexasl.patch(tiny("llama"), profile=path)


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "own.json"
    for other, words in (
        (
            tiny("qwen2"),
            r"is a profile for Qwen2ForCausalLM \(qwen2, 6 layers, hidden size 64\), and this model is Lla",
        ),
        (other_weights(model), "this model is LlamaForCausalLM .*, with other weights"),
    ):
        profile_of(other).save(path)
        with pytest.raises(flexasl.ConfigError, match=f"own.json {words}" if words[0] == "i" else words):
            flexasl.patch(model, profile=path)
        assert not hasattr(model, "flexasl_patch")


def test_a_stored_file_that_is_spoilt_is_named(known: Path) -> None:
    profile_of(tiny("qwen2")).save(known)
    with pytest.raises(
        flexasl.ConfigError, match=rf"{known.name} is a profile for Qwen2.*; remove that file, or give prof"
    ):
        flexasl.patch(tiny("llama"))
    known.write_text("[]")
    with pytest.raises(flexasl.ConfigError, match=r"holds no profile: .*; remove that file, or give profile=False"):
        flexasl.patch(tiny("llama"))
    flexasl.patch(tiny("llama"), profile=False).remove()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"policy": "snapkv"}, "would have no effect under policy 'snapkv'; leave it out"),
        ({"config": flexasl.ASLConfig.paper()}, "would have no effect where the config leaves nothing open"),
        ({"config": flexasl.ASLConfig(settled_by="variance")}, "would have no effect where the config leaves nothing"),
    ],
)
def test_what_would_have_no_effect_is_refused(how, words: str, tmp_path: Path) -> None:
    profile_of(tiny("llama")).save(tmp_path / "own.json")
    for asked in ({"profile": tmp_path / "own.json"}, {"calibrate": True, "tokenizer": tiny_tokenizer()}):
        with pytest.raises(flexasl.ConfigError, match=words):
            flexasl.patch(tiny("llama"), **how, **asked)


@pytest.mark.parametrize("setting", [{"contrast": False}, {"max_layer": 2}, {"score_from": 2}])
def test_a_profile_that_is_given_and_kept_out_is_refused(setting, known: Path) -> None:
    model, words = tiny("llama"), "profile=.* would have no effect, because the config sets other scores .*; leave it"
    with pytest.raises(flexasl.ConfigError, match=words):
        flexasl.patch(model, flexasl.ASLConfig(**setting), profile=known)
    assert not hasattr(model, "flexasl_patch")
    assert settings_on(model, flexasl.ASLConfig(**setting))[1] is None, "one that was found"


def test_a_profile_is_no_file_of_settings(known: Path) -> None:
    with pytest.raises(flexasl.ConfigError, match=r"holds no settings .* it is a profile; give the settings beside it"):
        flexasl.ASLConfig.load(known)


# How one is made.


def test_calibrate_makes_one_once_and_stores_it(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), tiny_tokenizer()
    config = flexasl.ASLConfig(select_tokens=50)
    with flexasl.patch(model, config, tokenizer=tokenizer, calibrate=FEW) as patch:
        first = patch.config
        (path,) = cache.rglob("*.json")
        assert path == profiles.path_for(calibrated_for(model)) and str(path) in patch.profile
        stored = Profile.load(path)
        assert first.select_tokens == 50 and stored.evidence.select_tokens == 100
        assert {name: getattr(first, name) for name in FOUND} == {
            name: getattr(stored.settings, name) for name in FOUND
        }
        assert set(stored.evidence.answers) == {"full", "default", "chosen"} and stored.evidence.prompts == {
            "needle": 1
        }
    monkeypatch.setattr("flexasl.tools.calibration.calibrating.calibrate", None)
    for how in ({}, {"calibrate": FEW}, {"calibrate": True}, {"profile": path}):
        with flexasl.patch(model, config, tokenizer=tokenizer, **how) as patch:
            assert patch.config == first and patch.profile is not None
    with flexasl.patch(model, config, profile=False) as patch:
        assert patch.profile is None


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("flexasl.tools.calibration.calibrating.calibrate", None)
    monkeypatch.setenv("FLEXASL_CACHE_DIR", "/proc/flexasl")
    with pytest.raises(flexasl.FlexASLError, match="cannot be made"):
        flexasl.patch(tiny("llama"), tokenizer=tiny_tokenizer(), calibrate=True)


def test_weights_without_a_digest_are_calibrated_for_this_time(folder: Path, cache: Path, monkeypatch) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), tiny_tokenizer()
    known = dataclasses.replace(calibrated_for(model), weights=None)
    for place in ("patch", "fingerprint"):
        monkeypatch.setattr(f"flexasl.integrations.transformers.{place}.calibrated_for", lambda model, name="": known)
    with flexasl.patch(model, tokenizer=tokenizer, calibrate=FEW) as patch:
        assert patch.profile == f"{known.model} (made now)" and not cache.exists()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"calibrate": True}, "calibrate=True needs the tokenizer to make prompts with; give tokenizer="),
        ({"calibrate": 1}, "calibrate=1 is an int; give True, False or arguments of flexasl.calibrate"),
        ({"calibrate": True, "profile": "own.json"}, "profile='own.json' and calibrate=True exclude each other"),
        ({"calibrate": True, "profile": False}, "profile=False and calibrate=True exclude each other"),
        ({"calibrate": {"samples": 0}, "tokenizer": True}, "samples=0 is too small"),
        (
            {"calibrate": True, "tokenizer": True, "config": flexasl.ASLConfig(contrast=False)},
            "contrast=False is given, and calibrate=True finds settings for contrast=True; give calibrate=",
        ),
        ({"calibrate": FEW, "tokenizer": True}, "tokenizer makes token 9.., and the model has 199; give the model's"),
    ],
)
def test_calibrate_refuses(cache: Path, how, words: str) -> None:
    how = how | ({"tokenizer": tiny_tokenizer()} if how.get("tokenizer") else {})
    with pytest.raises(flexasl.FlexASLError, match=words):
        flexasl.patch(tiny("llama"), **how)
    assert not hasattr(tiny("llama"), "flexasl_patch") and not list(cache.rglob("*.json"))


# Those that come with the library.


def test_every_file_of_the_library_is_a_profile_of_the_model_it_is_listed_for(monkeypatch) -> None:
    monkeypatch.undo()
    files = sorted(file.stem for file in profiles.FOLDER.glob("*"))
    assert files == sorted(profiles.SHIPPED)
    for name, shape in profiles.SHIPPED.items():
        model = Profile.load(profiles.FOLDER / f"{name}.json").model
        assert (model.model_type, model.num_layers, model.hidden_size) == shape


def test_files_of_the_library_go_into_the_wheel() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert Path(flexasl.__file__).parent / "profiles" == profiles.FOLDER
    assert wheel == {"packages": ["flexasl"]}, "all files of the package, none left out"
    assert not [line for line in (ROOT / ".gitignore").read_text().split() if "json" in line or "profiles" in line]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("profile", [True, False])
def test_evaluation_says_whether_profiles_count(loaded, tmp_path: Path, profile: bool, together: bool) -> None:
    profiles.store(profile_of(loaded[0]))
    asked = {"tasks": ["passkey"], "lengths": [200], "samples": 1, "policies": ["asl"], "budgets": [64]}
    evaluate(plan(**asked, profile=profile), *loaded, tmp_path / "out", together=together)
    _, answered = map(json.loads, (tmp_path / "out/answers-0.jsonl").read_text().splitlines())
    assert answered["tau"] == (0.55 if profile else 0.2)
    with pytest.raises(flexasl.FlexASLError, match=f"holds results with profile={profile}, not {not profile}"):
        evaluate(plan(**asked, profile=not profile), *loaded, tmp_path / "out", together=together)
