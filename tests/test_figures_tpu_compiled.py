"""The static figures of TPUs, by libtpu."""

import json

from figures import tpu


def test_a_row(capsys, tmp_path):
    path = tmp_path / "rows.json"
    arguments = ("--filter=mobilenetv2 128x7x7", "--chips=v5e", "--ops=forward", f"--json={path}")
    assert tpu.main(["tpu", "--implementations=pallas_tpu", *arguments]) == 0
    [row] = json.loads(path.read_text())
    assert row["op"] == "forward" and row["implementation"] == "pallas_tpu"
    assert tpu.Problem(tpu.TABLE[2], "forward", "v5e", "bfloat16").valu_floor < row["value"] < 10
    assert "| v5e | forward | mobilenetv2 128x7x7x960 k3 |" in capsys.readouterr().out


def test_a_failing_compilation_fails(capsys, monkeypatch):
    monkeypatch.setattr(tpu, "TABLE", (tpu.Layer("impossible", (8, 4, 200, 128), (1, 200), 4096),))
    arguments = ("--chips=v5e", "--ops=forward", "--implementations=pallas_tpu")
    assert tpu.main(["tpu", *arguments]) == 1
    assert "impossible, forward, v5e, bfloat16: " in capsys.readouterr().err
