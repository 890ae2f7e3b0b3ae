"""How annotations are checked under test: by beartype, an int where a float is asked for being as good."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
