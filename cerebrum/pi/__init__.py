"""The rooms of the Pi's daemon. Never imports cerebrum/vps."""
