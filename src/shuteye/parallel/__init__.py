"""One model over several ranks: who computes what, and how ranks add up and hand on what they have computed."""
