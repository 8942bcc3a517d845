"""``cogtune infer``: videos from a base model, a run, a LoRA or merged weights.

:mod:`.request` is what is asked for, :mod:`.filling` adds what the run and the model know and finds all that is wrong,
:mod:`.outputs` names the files, :mod:`.making` samples what is not there yet.
"""
