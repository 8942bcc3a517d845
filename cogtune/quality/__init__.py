"""What can be measured of sampled videos, and the signs that a fine-tune went wrong.

:mod:`.motion` and :mod:`.looks` measure one video, :mod:`.likeness` how alike videos are, :mod:`.references` has what
they are compared with. :mod:`.signs` names what is wrong, by the limits in :mod:`.limits`, and :mod:`.verdict` chooses.
"""
