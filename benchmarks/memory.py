"""`memory`: what Valkey needs to remember an id, and what the processes need under load."""

import secrets

from benchmarks.load import put_load
from benchmarks.report import Report, Side, below
from benchmarks.rig import Rig
from benchmarks.usage import wait_until_drained
from benchmarks.usage_requests import UsageRequests, expect_accepted

BATCH = 100
CONNECTIONS = 8
REQUESTS_AT_ONCE = 1_000


async def measure_memory(rig: Rig) -> Report:
    """So many distinct ids through the API and the worker, to the ledger; then only the ids are left in Valkey."""
    source = f"memory-{secrets.token_hex(4)}"
    requests = UsageRequests(source, await rig.make_headers(source))
    before = await _used_memory(rig)
    ids = max(rig.sizes)
    side = Side("ingest, the worker draining", "events/s")
    bar = rig.bars.add_task("memory", total=ids)
    await rig.stack.start_process("worker", "worker")
    try:
        while requests.made < ids:
            load = requests.make(max(1, min(REQUESTS_AT_ONCE, (ids - requests.made) // BATCH)), BATCH)
            async with rig.measured(side):
                result = await put_load([rig.api_port], load, connections=CONNECTIONS, check=expect_accepted(BATCH))
                # Without a pause the load would outrun the ledger until the service answers 429.
                await wait_until_drained(rig)
            side.rates.append(len(load) * BATCH * 1e9 / result.took)
            side.latencies += result.latencies
            rig.bars.update(bar, completed=requests.made)
        memory = rig.memory()
    finally:
        await rig.stack.stop_process("worker")
    an_id = (await _used_memory(rig) - before) / requests.made
    checked = await rig.check_usage(source, requests.made, requests.quantity)
    return Report(
        "memory",
        [side],
        None,
        [below(60, an_id, f"bytes an id in Valkey, at {requests.made:,} ids")],
        checked,
        memory=memory,
    )


async def _used_memory(rig: Rig) -> int:
    return int((await rig.resources.redis.info("memory"))["used_memory"])
