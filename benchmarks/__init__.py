"""How fast artifacts are, next to the float and int8 runtimes a user could take instead. Run by `make bench`."""
