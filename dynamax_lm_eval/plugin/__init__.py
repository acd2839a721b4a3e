"""Gives the folder of task YAMLs a name that can be imported, ``dynamax_lm_eval.plugin.tasks``, wherever it lies.

Harnesses that discover the entry-point group ``lm_eval.tasks`` look for the folder of the module that it names. In an
installation that is a folder of the package, in a source checkout one beside it. Standard library only.
"""

from __future__ import annotations

from dynamax_lm_eval import tasks_dir

__path__ = [str(tasks_dir().parent)]
