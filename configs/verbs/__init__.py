"""Settings of every verb but simulate, and what all verbs share."""
