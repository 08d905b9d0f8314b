"""Children that end badly, in place of nsp.export.compile.build_child."""
