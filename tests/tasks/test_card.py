"""The card of a run against the files it is made of: parsed back, and compared number by number."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from click.testing import CliRunner, Result
from huggingface_hub import ModelCard

import medvl
from modalities.ct.reader import CtReader
from modalities.xray.reader import XrayReader
from tasks.cli import cli

READERS = {
    XrayReader: {
        "size": 337,
        "channels": 3,
        "normalise": "fixed",
        "mean": [0.4978, 0.41, 0.123456789],
        "std": 0.2449,
        "reduced_decoding": True,
    },
    CtReader: {
        "spacing_mm": [1.25, None, 0.7],
        "shape": [77, None, 333],
        "windows_hu": [[-1001.5, 399.0], [-57.0, 211.0]],
        "crop": "thorax",
        "max_slices": 91,
        "antialias": False,
        "mean": 0.123456789,
        "std": 0.987654321,
        "series": 3,
    },
}


def command(*args: Any) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args])


@pytest.fixture
def run(tiny: Any, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be changed."""
    return Path(shutil.copytree(tiny.model, tmp_path / "run"))


def with_reader(run: Path, kind: type, arguments: dict[str, Any]) -> dict[str, Any]:
    config = json.loads((run / "config.json").read_text())
    config["model"]["reader"] = {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}
    (run / "config.json").write_text(json.dumps(config))
    return config


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables(card: str) -> dict[str, list[list[str]]]:
    """Heading -> rows of the tables below it, heads left out."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in card.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            found.setdefault(heading, []).append(cells(line))
    for rows in found.values():
        marks = [i for i, row in enumerate(rows) if set("".join(row)) == {"-"}]
        for i in reversed(marks):
            del rows[i - 1 : i + 1]
    return found


def code(cell: str) -> str:
    assert cell.startswith("`") and cell.endswith("`"), cell
    return cell[1:-1].replace("\\|", "|")


def flat(value: dict[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, dict) and "class_path" in item:
            found[before + name] = item["class_path"]
            found |= flat(item["init_args"], f"{before}{name}.")
        else:
            found[before + name] = item
    return found


def test_the_command_writes_a_card_that_the_hub_s_own_parser_reads(run: Path) -> None:
    done = command("card", run, "--license", "cc-by-nc-4.0")
    assert done.exit_code == 0, done.output
    assert Path(done.stdout.strip()) == run / "MODEL_CARD.md"
    card = ModelCard.load(run / "MODEL_CARD.md")
    assert (card.data.library_name, card.data.license) == ("medvl", "cc-by-nc-4.0")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert {"medical-imaging", "chest-x-ray"} <= set(card.data.tags)
    assert card.data.eval_results is None
    assert "Research use, not for diagnosis" in card.text and "Not measured" in card.text
    assert str(run) not in card.content


@pytest.mark.parametrize("kind", READERS)
def test_every_argument_of_config_json_stands_in_the_card_and_no_other(run: Path, kind: type) -> None:
    config = with_reader(run, kind, READERS[kind])
    assert set(READERS[kind]) == set(inspect.signature(kind).parameters)
    assert command("card", run).exit_code == 0
    found = tables((run / "MODEL_CARD.md").read_text())
    for part, title in (("image", "Image tower"), ("report", "Report tower"), ("similarity", "Similarity"), ("reader", "Reader")):
        expected = {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in flat(config["model"][part]["init_args"]).items()
        }
        rows = {code(name): code(value) for name, value in found[f"{title}: arguments as saved"]}
        assert rows == expected
    told = dict(found["What is done to an image"])
    unescaped = {step: re.sub(r"\\(.)", r"\1", words) for step, words in told.items()}
    assert unescaped == kind(**READERS[kind]).describe()
    everything = " ".join(unescaped.values())
    for number in re.findall(r"[\d.]+", json.dumps([v for v in READERS[kind].values() if not isinstance(v, bool)])):
        assert f"{float(number):.15g}" in everything or str(number) in everything or f"{float(number):.8g}" in everything, number


def test_sizes_and_provenance_are_those_of_the_files(run: Path, tiny: Any) -> None:
    assert command("card", run).exit_code == 0
    found = tables((run / "MODEL_CARD.md").read_text())
    weights = safetensors.numpy.load_file(run / "model.safetensors")
    sizes = {row[0]: row[2].replace(",", "") for row in found["What it is"] if len(row) == 3}
    assert int(sizes["all"]) == sum(array.size for array in weights.values())
    model = medvl.load(run, device="cpu")
    image = sum(tensor.numel() for tensor in model.image.state_dict().values())
    assert int(sizes["Image tower"]) == image > 0
    config = json.loads((run / "config.json").read_text())
    assert code(dict(row for row in found["What it is"] if len(row) == 2)["weights, SHA-256"]) == config["weights_sha256"]
    titles = {"training table, SHA-256": "manifest_sha256", "commit of the code": "commit", "step": "step"}
    for title, name in titles.items():
        value = config["provenance"].get(name)
        assert dict(found["Training"])[title] == ("not stated" if value is None else f"`{value}`")


def test_figures_are_those_of_results_json_with_n_and_interval(run: Path, tiny: Any, tmp_path: Path) -> None:
    out = tmp_path / "results"
    done = command("evaluate", "--model", run, "--manifest", tiny.manifest, "--out", out, "--repeats", 20, "--no-baseline")
    assert done.exit_code in (0, 1), done.output
    assert command("card", run, "--results", out / "results.json").exit_code == 0
    card = ModelCard.load(run / "MODEL_CARD.md")
    measured = json.loads((out / "results.json").read_text())
    found = tables(card.text)
    per_finding = measured["zero_shot"]["per_finding"]
    rows = {row[0].replace(" ", "_"): row for row in found["Findings"]}
    assert set(rows) == {*per_finding, "**mean**"}
    for name, one in per_finding.items():
        assert rows[name][1] == f"{one['auroc']:.3f} ({one['ci_low']:.3f} to {one['ci_high']:.3f})"
        assert rows[name][2] == f"{one['n_positive']} of {one['n']}"
        point = measured["grounding"]["per_finding"].get(name)
        if point is not None:
            assert rows[name][4].startswith(f"{point['pointing_game']:.3f} (") and rows[name][5] == str(point["n"])
    assert rows["**mean**"][1].startswith(f"{measured['zero_shot']['macro_auroc']:.3f}")
    direction = measured["retrieval"]["report_to_image"]
    row = next(row for row in found["Retrieval"] if row[:2] == ["report to image", "its own report"])
    assert row[2].startswith(f"{direction['recall_at_1']:.3f}") and row[-1] == str(direction["pool"])
    assert f"{direction['chance']:.3f}" == row[5]
    row = next(row for row in found["Ranking"] if row[:2] == ["report to image", "its own report"])
    for cell, name in zip(row[2:6], ("mean_rank", "mrr", "map", "ndcg_at_10"), strict=True):
        interval = direction[f"{name}_interval"]
        ends = f"{interval['ci_low']:.3f} to {interval['ci_high']:.3f}"
        assert cell == f"{direction[name]:.3f} ({ends}); {interval['chance']:.3f}"
    agreement = {row[0]: row for row in found["Clinical agreement of the first report"]}
    assert agreement["**micro**"][1].startswith(f"{measured['retrieval']['clinical_agreement']['micro']['present_f1']:.3f} (")
    assert [row[-2:] for row in found["Harder galleries"]] == [["0", "0"]] * 4, "these reports name no side and no severity"
    facts = dict(found["Results"])
    assert code(facts["table, SHA-256"]) == measured["data"]["manifest_sha256"] and measured["prompts"]["sha256"] in card.text
    assert facts["images, studies, patients"] == f"{measured['images']}, {measured['studies']}, {measured['patients']}"
    hub = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert hub["roc_auc"] == measured["zero_shot"]["macro_auroc"]
    assert hub["recall_at_10"] == measured["retrieval"]["image_to_report"]["recall_at_10"]


def test_results_in_the_run_s_folder_are_taken_and_another_model_s_are_refused(run: Path, tiny: Any, tmp_path: Path) -> None:
    done = command("evaluate", "--model", run, "--manifest", tiny.manifest, "--out", run, "--repeats", 5, "--no-baseline")
    assert done.exit_code in (0, 1), done.output
    assert command("card", run).exit_code == 0
    assert "### Findings" in (run / "MODEL_CARD.md").read_text()
    measured = json.loads((run / "results.json").read_text())
    cases = {
        "other weights": {**measured, "model": {"weights_sha256": "0" * 64}},
        "does not say which weights": {name: value for name, value in measured.items() if name != "model"},
        "not a results.json": {"model": measured["model"]},
        "expected a JSON object": [],
    }
    for said, content in cases.items():
        (run / "results.json").write_text(json.dumps(content))
        refused = command("card", run)
        assert refused.exit_code == 2 and said in refused.stderr, (said, refused.output)


def test_what_is_missing_or_no_run_is_a_usage_error(run: Path, tmp_path: Path) -> None:
    for arguments, said in (
        ((tmp_path / "absent",), "no such file"),
        ((run, "--results", tmp_path / "absent.json"), "no such file"),
        ((run, "--out", tmp_path), "is a folder"),
    ):
        done = command("card", *arguments)
        assert done.exit_code == 2 and said in done.stderr, done.output
    with_reader(run, XrayReader, {"size": 2**19})
    assert command("card", run).exit_code == 2
    (run / "config.json").write_text("{}")
    assert "not a medvl config.json" in command("card", run).stderr
    (run / "model.safetensors").unlink()
    assert command("card", run).exit_code == 2


def test_text_from_files_is_never_markup(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    evil = "<script>x</script> | ` | **b** [l](http://e)\n# heading\n---"
    config["provenance"] |= {"commit": evil, "chosen_by": evil}
    config["model"]["report"]["init_args"]["more"] = evil
    config["medvl"] = evil
    (run / "config.json").write_text(json.dumps(config))
    assert command("card", run).exit_code == 0
    text = (run / "MODEL_CARD.md").read_text()
    found = tables(text)
    assert {len(row) for row in found["Training"]} == {2}
    outside_code = re.sub(r"`[^`\n]*`", "", text)
    assert not re.search(r"(?<!\\)<script|(?<!\\)\*\*b|(?<!\\)\[l\]|^# heading|^---$", outside_code.split("---", 2)[2], re.MULTILINE)


def test_fit_leaves_a_card(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(subcommand: str, args: list[str], finished: Any) -> int:
        assert (finished is not None) == (subcommand == "fit")
        if finished is not None:
            finished(run)
        return 0

    stub = types.ModuleType("medvl.training.cli")
    stub.run = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "medvl.training.cli", stub)
    assert command("validate").exit_code == 0 and not (run / "MODEL_CARD.md").exists()
    assert command("fit").exit_code == 0
    assert ModelCard.load(run / "MODEL_CARD.md").data.library_name == "medvl"


@pytest.fixture(scope="module")
def measured_run(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with results and probes beside it, of a table with sexes."""
    root = tmp_path_factory.mktemp("measured")
    shutil.copytree(tiny.model, root / "model")
    folder = shutil.copytree(tiny.folder, root / "studies")
    lines = (folder / "manifest.csv").read_text().splitlines()
    sexes = ["sex", *("FM"[i % 2] for i in range(len(lines) - 1))]
    (folder / "manifest.csv").write_text("\n".join(f"{line},{sex}" for line, sex in zip(lines, sexes, strict=True)) + "\n")
    options = ["--manifest", folder / "manifest.csv", "--repeats", 20, "--allow-leak", "similar-images"]
    done = command("evaluate", "--model", root / "model", *options, "--out", root / "results.json")
    assert done.exit_code == 0, done.output
    probed = command("probe", "--model", root / "model", *options, "--out", root)
    assert probed.exit_code == 0, probed.output
    return root


def test_protocol_leaks_metrics_subgroups_and_probes_are_those_of_the_files(measured_run: Path) -> None:
    assert command("card", measured_run / "model").exit_code == 0, "results and probes beside the run are found"
    text = (measured_run / "model" / "MODEL_CARD.md").read_text()
    measured, probed = (json.loads((measured_run / name).read_text()) for name in ("results.json", "probes.json"))
    found = tables(text)
    protocol = {row[0]: code(row[1]) for row in found["Protocol"] if row[1].startswith("`")}
    assert protocol["protocol, SHA-256"] == measured["protocol"]["sha256"]
    assert protocol["all but the weights, SHA-256"] == measured["protocol"]["method_sha256"]
    assert dict(found["Leak check"])["allowed by name"] == "similar-images"
    for name, one in measured["classification"]["findings"].items():
        row = next(row for row in found["Classification"] if row[0] == name.replace("_", " "))
        area = one["auprc"]
        assert row[1] == f"{area['value']:.3f} ({area['ci_low']:.3f} to {area['ci_high']:.3f})"
        assert row[-2:] == [str(one["labels"]["uncertain"]), str(one["labels"]["unmentioned"])]
    groups = measured["subgroups"]["attributes"]["sex"]["groups"]
    rows = {row[1]: row for row in found["Subgroups"] if row[0] == "sex"}
    assert {"female", "male", "**widest gap**"} == set(rows)
    for name, own in groups.items():
        assert rows[name][2] == str(own["n"])
        mean = own["auroc"]["mean"]
        assert rows[name][3].startswith("–" if mean["value"] is None else f"{mean['value']:.3f} (")
    simple = measured["baseline"]["per_finding_intervals"]
    for row in found["Findings"][:-1]:
        own = simple[row[0].replace(" ", "_")]
        assert row[3] == ("–" if own["value"] is None else f"{own['value']:.3f} ({own['ci_low']:.3f} to {own['ci_high']:.3f})")
    assert "Not measured by subgroup, since the table does not say: age, scanner, site" in text
    assert "All studies measured are of one kind of view: PA" in text
    means = {(one["probe"], one["setting"]): one for one in probed["probes"] if one["name"] == "mean"}
    shown = {(row[0], row[1]): row for row in found["Probes"] if len(row) == 4}
    for key, one in means.items():
        row = shown[tuple(re.sub(r"[_*]", lambda mark: "\\" + mark[0], part) for part in key)]
        assert row[2].startswith("–" if one["value"] is None else f"{one['value']:.3f} (") and row[3] == str(one["n"])
    noise = next(row for row in found["Probes"] if row[0] == "noise")
    strongest = next(one for one in probed["probes"] if (one["name"], one["setting"]) == ("noise", "5"))
    assert len(noise) == 6 and noise[5].startswith(f"{strongest['value']:.3f}")


def test_a_card_with_a_figure_of_no_file_is_told(measured_run: Path, tmp_path: Path) -> None:
    run, mine = measured_run / "model", tmp_path / "card.md"
    assert command("card", run, "--out", mine).exit_code == 0
    kept = command("card", run, "--check", mine)
    assert kept.exit_code == 0 and "every figure has its source" in kept.output
    text = mine.read_text()
    macro = json.loads((measured_run / "results.json").read_text())["zero_shot"]["macro_auroc"]
    for changed in (
        text.replace(f"| **mean** | {macro:.3f}", "| **mean** | 0.999", 1),
        text.replace("## Limits", "AUROC on our own films: 0.97\n\n## Limits"),
        text.replace("| noise |", "| noise2 |", 1),
    ):
        assert changed != text
        mine.write_text(changed)
        refused = command("card", run, "--check", mine)
        assert refused.exit_code == 2 and "figures without a source" in refused.output and "line " in refused.output
    mine.write_text(text.replace("## Training", "Trained in 2026 on 2 machines.\n\n## Training", 1))
    assert command("card", run, "--check", mine).exit_code == 0, "what is not measured may be said by hand"


def test_what_a_person_says_may_claim_only_what_was_measured(measured_run: Path, tmp_path: Path) -> None:
    macro = json.loads((measured_run / "results.json").read_text())["zero_shot"]["macro_auroc"]
    about = tmp_path / "about.yaml"
    good = {
        "name": "tiny <b>one</b>",
        "data": ["24 studies, made in 2026."],
        "failures": f"Its mean AUROC is {macro:.2f}, or {100 * macro:.1f} %.",
    }
    about.write_text(json.dumps(good))
    out = tmp_path / "card.md"
    assert command("card", measured_run / "model", "--about", about, "--out", out).exit_code == 0
    text = out.read_text()
    assert "24 studies, made in 2026." in text and f"{macro:.2f}" in text and "<b>" not in text.split("---", 2)[2].replace("\\<b\\>", "")
    for claim in ("AUROC 0.9876 on new films", "98.76 % sensitive", "better than .9876"):
        about.write_text(json.dumps({**good, "intended_use": claim}))
        refused = command("card", measured_run / "model", "--about", about, "--out", out)
        assert refused.exit_code == 2 and "9876" in refused.output.replace("98.76", "9876"), refused.output
    about.write_text("more: 1")
    assert "expected name, intended_use" in command("card", measured_run / "model", "--about", about).output.replace("\n", " ")


def test_a_name_puts_the_card_among_the_cards(measured_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("card", measured_run / "model", "--name", "tiny").exit_code == 0
    assert (tmp_path / "model_cards" / "tiny.md").is_file()
    assert command("card", measured_run / "model", "--name", "../tiny").exit_code == 2


def test_results_without_a_protocol_are_refused(measured_run: Path, tmp_path: Path) -> None:
    measured = json.loads((measured_run / "results.json").read_text())
    del measured["protocol"]
    (tmp_path / "old.json").write_text(json.dumps(measured))
    refused = command("card", measured_run / "model", "--results", tmp_path / "old.json", "--out", tmp_path / "card.md")
    assert refused.exit_code == 2 and "has no 'protocol'" in refused.output and not (tmp_path / "card.md").exists()


CARDS = sorted((Path(__file__).parents[2] / "model_cards").glob("*.md"))


@pytest.mark.parametrize("card", [one for one in CARDS if one.name != "README.md"], ids=lambda one: one.stem)
def test_every_figure_of_a_shipped_card_is_one_of_the_files_beside_it(card: Path, tmp_path: Path) -> None:
    from tasks.card import ResultsError, check_card

    results, probes = card.with_suffix("") / "results.json", card.with_suffix("") / "probes.json"
    check_card(card, results, probes)
    text = card.read_text()
    changed = tmp_path / card.name
    changed.write_text(re.sub(r"\| \*\*mean\*\* \| 0\.\d{3}", "| **mean** | 0.999", text, count=1))
    with pytest.raises(ResultsError, match="figures without a source"):
        check_card(changed, results, probes)
    assert json.loads(results.read_text())["protocol"]["sha256"] in text and "not for diagnosis" in text
