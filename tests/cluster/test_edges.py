"""Which hosts the stages are on."""

from ds_local.cluster.edges import describe_hosts


def test_hosts_of_stages_are_a_sentence():
    hosts = {
        "stage 0": {"hosts": ["a", "b"], "ranks": [0, 1, 2]},
        "stage 1": {"hosts": ["c"], "ranks": [3, 5]},
        "stage 2": {"hosts": ["c"], "ranks": [4]},
    }
    said = "stage 0 on a, b (ranks 0-2); stage 1 on c (ranks 3, 5); stage 2 on c (rank 4)"
    assert describe_hosts(hosts) == said
    assert describe_hosts({}) == ""
