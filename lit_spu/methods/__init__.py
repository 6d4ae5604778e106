"""The methods, one per module. All modules are imported here, so a class is found by its name and listed nowhere."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
