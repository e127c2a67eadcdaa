"""A job on somebody's cluster: from the job file and its plan to what the cluster's own engine takes.

``fleet`` is the job in the engine's terms: which parts, on how many machines. Each engine is one function from a fleet
to text (``slurm``, ``kubernetes``, ``skypilot``), ``rendering`` is their catalogue, and ``order`` writes the text
and hands it over. Nothing here imports torch, and nothing asks a cluster anything before it submits.
"""
