"""The registry of orders, by name. A new one is one file beside this one and one entry below."""

from __future__ import annotations

from services.orders.base import QueueOrder
from services.orders.edf import Edf
from services.orders.fcfs import Fcfs
from services.orders.hrrn import Hrrn
from services.orders.multi_bin import MultiBin
from services.orders.sjf import Sjf
from services.orders.vtc import Vtc

_ORDERS: tuple[type[QueueOrder], ...] = (Fcfs, Sjf, Hrrn, Edf, Vtc, MultiBin)

ORDERS: dict[str, type[QueueOrder]] = {order.name: order for order in _ORDERS}
