"""Glue for training frameworks; imports none of them until used."""
