"""The benchmark on a folder with a model, as users have one."""

import json
import sys

import bench
import pytest
from conftest import tiny_model


def test_a_model_of_a_folder_gives_equal_results_both_ways(tmp_path, tokenizer, monkeypatch):
    folder, out = str(tmp_path / "tiny"), tmp_path / "bench.json"
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = ["--model", folder, "--only", "recall step", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    with pytest.raises(SystemExit) as done:
        bench.main()
    [row] = json.loads(out.read_text())
    assert not done.value.code and row["equal"] is True
    assert row["shape"] == "recall step tiny: prompts 2, length 256, group 8, new 32"
    # 16 rows are read, continued by all but the last token, and trained
    assert row["plain_tokens"] == 2 * 16 * (256 + 31) and row["tokens"] < row["plain_tokens"] / 4
