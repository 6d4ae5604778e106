"""The methods, one per module. Importing the package imports all of them, so that no file lists them."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
