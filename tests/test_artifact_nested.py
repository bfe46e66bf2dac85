"""Artifacts inside an artifact's directory, and folders that only look like them."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_artifact import build

from moecompiler.artifact_writer import writing
from moecompiler.errors import UserError


def test_artifacts_inside_are_ours(tmp_path: Path) -> None:
    """A compile puts its steps' artifacts inside its own directory before that has a manifest."""
    build(tmp_path / "engine" / "export", "a", 2)
    with writing(tmp_path / "engine", "engine", 1, {}) as writer:
        assert not writer.is_done(0, "key")


@pytest.mark.parametrize("content", ["{}", "not json", '{"moecompiler": "1", "format": 1}'])
def test_a_folder_with_somebody_elses_manifest_is_not_ours(tmp_path: Path, content: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="files of someone else"), writing(tmp_path, "engine", 1, {}):
        pass
