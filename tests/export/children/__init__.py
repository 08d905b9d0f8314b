"""Children that end badly, in place of export.build_child."""
