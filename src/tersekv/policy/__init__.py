"""Which token goes to which tier, and when. A policy moves tokens; no codec and no kernel knows of it."""
