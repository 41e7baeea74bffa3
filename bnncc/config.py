"""Defaults that a training script may change, by attribute or from the command line.

Each part of bnncc that has such defaults keeps one object of a `Config` subclass: `bnncc.layers.config.config`,
`bnncc.quantizations.config.config` and `bnncc.quantizations.progressive_sign.config`. Names and values are bitorch's.
A layer reads them when it is built, unless its documentation says otherwise.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace


class Config:
    """Base class. Every public attribute of a subclass that is not a method is a default; `name` heads its arguments.

    >>> class Training(Config):
    ...     name = "training"
    ...     use_mixup = False
    ...     learning_rate = 3e-3
    """

    name: str

    def attributes(self) -> list[str]:
        """The names of the defaults, sorted."""
        return [
            attribute
            for attribute in dir(self)
            if not attribute.startswith("_") and attribute != "name" and not callable(getattr(self, attribute))
        ]

    def add_config_arguments(self, parser: ArgumentParser) -> None:
        """Adds an option per default, ``--padding-value`` for `padding_value`; that of a boolean inverts it."""
        group = parser.add_argument_group(self.name, f"{self.name} configuration settings")
        for attribute in self.attributes():
            option, value = f"--{attribute.replace('_', '-')}", getattr(self, attribute)
            if isinstance(value, bool):
                group.add_argument(
                    option, dest=attribute, default=value, action="store_false" if value else "store_true"
                )
            else:
                group.add_argument(option, dest=attribute, default=value, type=type(value))

    def apply_args_to_configuration(self, args: Namespace) -> None:
        """Takes over what a parser with these options has read."""
        for attribute in self.attributes():
            setattr(self, attribute, getattr(args, attribute))
