import json
from pathlib import Path

import pytest

from benchmarks.speed import all as together
from bernini.errors import BerniniError


def test_what_fails_is_named_and_the_rest_is_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _, small = together.COMMANDS["rope"]
    monkeypatch.setattr(together, "COMMANDS", {"broken": ("no_module", ""), "rope": ("rope", small)})
    with pytest.raises(BerniniError, match="broken failed"):
        together.main(["--small", "--out", str(tmp_path)])
    figures = json.loads((tmp_path / "rope.json").read_text())
    table = capfd.readouterr().out.rpartition("tokens/s")[2]
    median = figures["shapes"]["tiny"]["contestants"]["ours"]["forward"]["ms"]["median"]
    (row,) = (line for line in table.splitlines() if line.startswith("rope: tiny ours forward "))
    assert float(row.split()[-1]) == pytest.approx(median, abs=1e-3)
    assert not (tmp_path / "broken.json").exists()
