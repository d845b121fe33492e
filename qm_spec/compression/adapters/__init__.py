"""Adapters to models of other libraries, which are needed only where one is used."""
