"""How a network is trained and its gap measured, on Lightning."""
