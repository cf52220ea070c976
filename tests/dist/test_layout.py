import jobs
from ranks import run_ranks


def test_where_stages_lie_changes_who_computes_and_not_what():
    across, within = (
        run_ranks(jobs.train, 4, {"mode": "local", "layout": {"stages": place}}, 2, 2)
        for place in ("across_nodes", "within_node")
    )
    assert [result["stage"] for result in across] == [0, 0, 1, 1]
    assert [result["stage"] for result in within] == [0, 1, 0, 1]
    assert across[0]["reports"] == within[0]["reports"]
    assert across[0]["eval"] == within[0]["eval"]
