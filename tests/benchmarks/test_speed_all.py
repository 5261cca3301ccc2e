import json
from pathlib import Path

import pytest

from benchmarks.speed import all as together
from bernini.errors import BerniniError


def test_what_fails_is_named_and_the_rest_is_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _, small = together.COMMANDS["packs"]
    monkeypatch.setattr(together, "COMMANDS", {"broken": ("no_module", ""), "packs": ("packs", small)})
    with pytest.raises(BerniniError, match="broken failed"):
        together.main(["--small", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "packs.json").read_text())
    table = capfd.readouterr().out.rpartition("tokens/s")[2]
    median = figures["contestants"]["packs"]["ms"]["median"]
    (row,) = (line for line in table.splitlines() if line.startswith("packs: packs "))
    assert float(row.split()[2]) == pytest.approx(median, abs=1e-3)
    assert not (tmp_path / "broken.json").exists()
