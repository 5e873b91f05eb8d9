"""Laws of `sottovoce audit scores=FILE`: scores of any system, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sottovoce.client.errors import ConfigError, DataError
from sottovoce.privacy.audit.run import AuditConfig, run_audit
from sottovoce.privacy.audit.score_file import read_scores

Rows = list[dict[str, Any]]


def _candidates(shift: float, count: int = 1200, seed: int = 0) -> Rows:
    generator = np.random.default_rng(seed)
    coins = generator.random(count) < 0.5
    scores = generator.standard_normal(count) + shift * coins
    return [
        {"id": f"user-{i}", "member": bool(coin), "score": float(score)}
        for i, (coin, score) in enumerate(zip(coins, scores, strict=True))
    ]


def _csv(path: Path, rows: Rows, delimiter: str = ",") -> Path:
    lines = [delimiter.join(("id", "member", "score"))]
    lines += [delimiter.join(str(row[c]) for c in ("id", "member", "score")) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _audit(path: Path, **settings: Any) -> tuple[int, dict[str, Any]]:
    code = run_audit(AuditConfig(scores=str(path), **settings))
    return code, json.loads((path.parent / "audit.json").read_text(encoding="utf-8"))


def test_all_formats_hold_the_same_scores(tmp_path: Path) -> None:
    rows = _candidates(1.0, 40)
    other = [{"member": 1 if r["member"] else "no", "score": str(r["score"]), "id": r["id"],
              "age": 3} for r in rows]
    files = [_csv(tmp_path / "a.csv", rows), _csv(tmp_path / "a.tsv", rows, "\t"),
             tmp_path / "a.json", tmp_path / "a.jsonl"]
    files[2].write_text(json.dumps(other), encoding="utf-8")
    files[3].write_text("\ufeff" + "\n\n".join(map(json.dumps, other)), encoding="utf-8")
    found = [read_scores(path) for path in files]
    for one in found:
        assert list(one.member_ids) == [r["id"] for r in rows if r["member"]]
        outside = [r["score"] for r in rows if not r["member"]]
        np.testing.assert_array_equal(one.non_members, outside)


@pytest.mark.parametrize("name", ["$\\frac$.csv", "[red]x.csv", "_under.csv", "a<b>.csv"])
def test_no_file_name_breaks_the_report_or_is_read_as_markup(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out[" / "b]"
    path = _csv(tmp_path / name, _candidates(1.0, 60))
    assert run_audit(AuditConfig(scores=str(path), output=str(folder))) == 4
    printed = capsys.readouterr().out
    assert path.stem in printed and "out[/b]/audit.html" in printed
    assert "a<b>" not in (folder / "audit.html").read_text(encoding="utf-8")


def test_ids_may_hold_any_line_separator(tmp_path: Path) -> None:
    names = ["a\u2028b", "c\x85d", "e\x0cf", "g\nh"]
    rows = [{"id": n, "member": i % 2 == 0, "score": i} for i, n in enumerate(names)]
    table, lines = tmp_path / "a.csv", tmp_path / "a.jsonl"
    text = "".join(f'"{r["id"]}",{r["member"]},{r["score"]}\n' for r in rows)
    table.write_text("id,member,score\n" + text, encoding="utf-8", newline="")
    lines.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    for path in (table, lines):
        found = read_scores(path)
        assert [*found.member_ids, *found.non_member_ids] == [names[i] for i in (0, 2, 1, 3)]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "id,member,score,score\na,1,2,3\nb,0,1,4\n", "column score is there twice"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.csv", "id,member,score\na,1,1.7e308\nb,0,-1.7e308\n", "no finite number"),
    ],
)
def test_ambiguous_and_boundless_files_are_refused_in_one_line(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        read_scores(tmp_path / name)


def test_scores_of_any_size_are_measured(tmp_path: Path) -> None:
    rows = [{**r, "score": r["score"] * 1e299} for r in _candidates(1.0, 100)]
    _, huge = _audit(_csv(tmp_path / "huge.csv", rows), claim_epsilon=1.0)
    rows = [{**r, "score": r["score"] / 1e299} for r in rows]
    _, usual = _audit(_csv(tmp_path / "usual.csv", rows), claim_epsilon=1.0)
    estimate = usual["attacks"][0]["epsilon_estimate"]
    assert huge["attacks"][0]["epsilon_estimate"] == pytest.approx(estimate, rel=1e-6)


@pytest.mark.parametrize(
    ("shift", "claim", "code", "verdict"),
    [
        (3.0, 0.5, 2, "VIOLATION"),
        (0.0, 0.5, 0, "NO VIOLATION FOUND"),
        (3.0, 8.0, 4, "INCONCLUSIVE"),
        (3.0, None, 4, "INCONCLUSIVE"),
    ],
)
def test_verdict_and_exit_code_follow_the_claim(
    tmp_path: Path, shift: float, claim: float | None, code: int, verdict: str
) -> None:
    path = _csv(tmp_path / "mine.csv", _candidates(shift))
    found, record = _audit(path, claim_epsilon=claim, delta=1e-5, coins=True)
    assert (found, record["verdict"]) == (code, verdict)
    assert record["claim"]["epsilon"] == claim and record["claim"]["delta"] == 1e-5
    (attack,) = record["attacks"]
    assert attack["name"] == "mine" and attack["canaries"] == 600
    assert (tmp_path / "audit.html").read_text(encoding="utf-8").count("<svg") >= 2
    if claim is not None:
        assert 0 <= attack["detection_power"]["this_attack"] <= 1


def test_raw_scores_and_ids_are_kept_so_that_anybody_can_weigh_them_again(tmp_path: Path) -> None:
    rows = _candidates(1.0)
    _, first = _audit(_csv(tmp_path / "s.csv", rows), claim_epsilon=1.0, coins=True)
    kept = [
        {"id": name, "member": side == "members", "score": score}
        for side in ("members", "non_members")
        for name, score in zip(*first["scores"]["s"][side].values(), strict=True)
    ]
    again = tmp_path / "again"
    again.mkdir()
    _, second = _audit(_csv(again / "s.csv", kept), claim_epsilon=1.0, coins=True)
    assert second["attacks"][0]["auc"] == first["attacks"][0]["auc"]
    assert second["attacks"][0]["epsilon_lower_bound"] == pytest.approx(
        first["attacks"][0]["epsilon_lower_bound"]
    )


def test_declared_guesses_and_a_gaussian_mechanism_prove_more_where_they_apply(
    tmp_path: Path,
) -> None:
    path = _csv(tmp_path / "s.csv", _candidates(1.5, 4000))
    def bound(**settings: Any) -> float:
        attack = _audit(path, delta=1e-5, coins=True, **settings)[1]["attacks"][0]
        return float(attack["epsilon_lower_bound"])

    plain = bound()
    assert bound(guesses=[0.05, 0.1]) > plain
    assert bound(mechanism="gaussian") > plain


def test_a_split_uses_fewer_candidates_than_coins_and_says_what_it_assumes(tmp_path: Path) -> None:
    path = _csv(tmp_path / "s.csv", _candidates(1.0))
    _, split = _audit(path, claim_epsilon=2.0)
    _, coins = _audit(path, claim_epsilon=2.0, coins=True)
    assert split["attacks"][0]["relation"] == "replace_one"
    assert coins["attacks"][0]["relation"] == "add_remove"
    assert split["attacks"][0]["canaries"] < coins["attacks"][0]["canaries"]
    assert "exchanging one" in split["attacks"][0]["assumes"]


def test_coins_that_cannot_be_fair_are_invalid(tmp_path: Path) -> None:
    rows = [r for r in _candidates(1.0) if r["member"]] + _candidates(0.0, 40, seed=1)
    rows = [{**row, "id": i} for i, row in enumerate(rows)]
    code, record = _audit(_csv(tmp_path / "s.csv", rows), claim_epsilon=1.0, coins=True)
    assert code == 3 and "leave coins=false" in record["reason"]


def test_scores_turned_around_are_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _audit(_csv(tmp_path / "s.csv", _candidates(-1.0)), claim_epsilon=1.0)
    shown = " ".join(capsys.readouterr().out.split())
    assert "turn their sign around" in shown


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("s.csv", "", "line 1: no column id, member, score"),
        ("s.csv", "id,score\n1,2\n", "line 1: no column member: begin with a header"),
        ("s.csv", "id,member,score\n", "holds no members"),
        ("s.csv", "id,member,score\n1,true,1\n2,yes,2\n", "holds no non-members: score candidates"),
        ("s.csv", "id,member,score\n1,true,1\n2,maybe,2\n", "line 3: member='maybe' is neither"),
        ("s.csv", "id,member,score\n1,true,nan\n", "line 2: score='nan' is no finite number"),
        ("s.csv", "id,member,score\n1,true,inf\n", "score='inf' is no finite number"),
        ("s.csv", "id,member,score\n1,true,\n", "line 2: score='' is no finite number"),
        ("s.csv", "id,member,score\n1,true\n", "line 2: score=None is no finite number"),
        ("s.csv", "id,member,score\n1,true,1\n\n1,false,2\n", "line 4: id=1 was in line 2 already"),
        ("s.csv", "id,member,score\n ,true,1\n", "line 2: id is missing"),
        ("s.jsonl", '{"id": 1, "member": true, "score": NaN}\n', "line 1: score=nan is no finite"),
        ("s.jsonl", '{"id": 1, "member": true, "score": 1}\n{"id"\n', "line 2 is not JSON"),
        ("s.jsonl", "[1, 2]\n", "line 1 is no object"),
        ("s.json", '{"id": 1}', "is no list"),
        ("s.json", '[{"id": 1, "member": true, "score": true}]', "entry 1: score=True"),
        ("s.json", '[{"id": 1, "member": 2, "score": 1}]', "entry 1: member=2 is neither"),
        ("s.txt", "x", "is none of .csv, .tsv, .json, .jsonl"),
    ],
)
def test_a_bad_row_is_one_line_that_names_it_and_the_remedy(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        run_audit(AuditConfig(scores=str(path)))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_files_that_are_absent_or_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        run_audit(AuditConfig(scores=str(tmp_path / "none.csv")))
    (tmp_path / "b.csv").write_bytes(b"id,member,score\n\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        run_audit(AuditConfig(scores=str(tmp_path / "b.csv")))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"run": "runs/x"}, "run= and scores= exclude each other"),
        ({"unit": "user"}, "unit=user is unknown: choose device, example"),
        ({"observer": "me"}, "observer=me is unknown"),
        ({"mechanism": "laplace"}, "mechanism=laplace is unknown"),
        ({"mechanism": "gaussian", "delta": 0.0}, "delta=0.0 leaves mechanism=gaussian"),
        ({"delta": 1.0}, "delta=1.0 must be"),
        ({"claim_epsilon": -1.0}, "claim_epsilon=-1.0 must be"),
        ({"holdout": 1.0}, "holdout=1.0 must be"),
        ({"guesses": [0.6]}, "guesses=0.6 must be"),
        ({"guesses": []}, "declares none"),
        ({"guesses": ["few"]}, "few"),
        ({"attacks": ["device_loss"]}, "needs run="),
        ({"devices": 5}, "needs run="),
    ],
)
def test_impossible_settings_are_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    path = _csv(tmp_path / "s.csv", _candidates(1.0, 40))
    with pytest.raises(ConfigError, match=words) as caught:
        run_audit(AuditConfig(**{"scores": str(path), **settings}))
    assert "\n" not in str(caught.value)


def test_the_output_folder_is_made_and_nothing_is_left_beside_the_file(tmp_path: Path) -> None:
    path = _csv(tmp_path / "s.csv", _candidates(1.0, 100))
    run_audit(AuditConfig(scores=str(path), output=str(tmp_path / "deep" / "er")))
    assert sorted(p.name for p in (tmp_path / "deep" / "er").iterdir()) == [
        "audit.html", "audit.json",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "s.csv"]
    with pytest.raises(ConfigError, match="is a file"):
        run_audit(AuditConfig(scores=str(path), output=str(path)))


@pytest.mark.parametrize("count", [2, 3, 9])
def test_a_handful_of_candidates_is_weighed_too(tmp_path: Path, count: int) -> None:
    rows = [{"id": i, "member": i % 2, "score": 1.0} for i in range(count)]
    code, record = _audit(_csv(tmp_path / "s.csv", rows), claim_epsilon=3.0)
    assert code == 4 and record["attacks"][0]["epsilon_lower_bound"] == 0


def test_no_torch_is_loaded_to_weigh_scores(tmp_path: Path) -> None:
    path = _csv(tmp_path / "s.csv", _candidates(1.0, 100))
    program = (
        "import sys; from sottovoce.server import cli; code = cli.main(sys.argv[1:]); "
        "print('heavy', sorted({'torch', 'flwr', 'ray', 'dp_accounting'} & set(sys.modules)));"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "audit", f"scores={path}", "claim_epsilon=0.5",
         "format=json"],
        capture_output=True, text=True, timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("heavy []")
    record = json.loads(done.stdout[: done.stdout.rindex("heavy")])
    assert record["verdict"] == "NO VIOLATION FOUND" and "scores" not in record
