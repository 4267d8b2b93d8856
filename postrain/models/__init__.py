"""Networks behind the record `postrain.types.Model`."""
