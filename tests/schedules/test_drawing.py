"""Schedules and route tables as pictures and traces."""

import re

from ds_local.schedules.drawing import draw_routes
from ds_local.schedules.routes import make_routes


def test_a_route_table_has_a_cell_for_each_route():
    table = make_routes("overlapping", 3, 2, "mean")
    text = draw_routes([("", table)]).file()
    tips = re.findall(r"<title>loss (\d) trains segment (\d)</title>", text)
    routes = {(str(loss), str(s)) for loss, row in table.weights.items() for s in row}
    assert set(tips) == routes
    assert text.count(">0.5<") == 4
