"""From events to epsilon: ledger, composition, accountants, calibration."""
