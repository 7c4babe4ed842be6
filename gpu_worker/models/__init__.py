"""Model definitions; each family is written once, for every device."""
