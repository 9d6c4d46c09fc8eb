"""The type checker that the second test run hangs on every function of the library."""

from beartype import BeartypeConf, beartype

# an int is welcome where a float is asked for, as PEP 484 has it
enforce = beartype(conf=BeartypeConf(is_pep484_tower=True))
