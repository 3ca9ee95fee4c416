"""Compiles every row of the table of resources and writes it: python -m tests.aot"""

import os
import sys

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")

from tests.aot import table

rows = {}
launches = table.launches()
for i, (name, launch) in enumerate(launches.items(), 1):
    rows[name] = table.row(*launch)
    spills = f"  spills {rows[name]['stack']} bytes" if rows[name]["stack"] else ""
    print(f"[{i}/{len(launches)}] {name}: {rows[name]['registers']} registers{spills}", flush=True)
table.save(rows)
spilled = [name for name in rows if rows[name]["stack"]]
print(f"wrote {table.FILE}: {len(rows)} rows, {len(spilled)} spill")
sys.exit(bool(spilled))
