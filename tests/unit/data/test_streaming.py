"""Files that are larger than the memory which may be used."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
_COUNT = """
import resource, sys
from pathlib import Path
from mindspeed_lora.data.readers import BadRow, Row, read_rows
def address_space():
    for line in open("/proc/self/status"):
        if line.startswith("VmSize"):
            return int(line.split()[1]) * 1024
limit = address_space() + (24 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
rows = list(map(type, read_rows(Path(sys.argv[1]))))
print(rows.count(Row), rows.count(BadRow))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_of_more_bytes_than_memory(tmp_path: Path, name: str) -> None:
    """64 MiB of rows, in 24 MiB beyond what Python itself takes; a line of 8 MiB and broken ones among them."""
    path = tmp_path / name
    is_list = name == "rows.json"
    row = json.dumps({"instruction": "I" * 3000, "output": "ä" * 500})
    with path.open("w") as stream:
        stream.write("[\n" if is_list else "")
        count = 0
        while stream.tell() < 64 << 20:
            stream.write((",\n" if is_list and count else "") + row + ("" if is_list else "\n"))
            count += 1
            if count == 1000:
                long = json.dumps({"instruction": "L" * (4 << 20), "output": ""})
                stream.write(f",\n{long},\n3" if is_list else f"{long}\n3\nx\n")
        stream.write("\n]" if is_list else "")
    done = subprocess.run(
        [sys.executable, "-c", _COUNT, str(path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str(count + 1), "1" if is_list else "2"]
