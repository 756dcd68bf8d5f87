"""In which order codes are predicted, and what the transformer reads at each step."""

from varcli.order.base import Order
from varcli.order.scale import ScaleOrder

ORDERS: dict[str, type[Order]] = {"scale": ScaleOrder}
"""Every generation order by name; the contract tests run over this table."""

__all__ = ["ORDERS", "Order", "ScaleOrder"]
