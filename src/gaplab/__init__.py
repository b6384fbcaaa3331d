"""gaplab: how large is a classifier's overfitting gap, what closes it, and is the difference real?"""
