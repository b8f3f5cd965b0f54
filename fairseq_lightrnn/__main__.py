"""``python -m fairseq_lightrnn``: the flags of the plugin, and the path to give to --user-dir."""

import sys

from fairseq_lightrnn.commands.start import require_fairseq

if __name__ == "__main__":
    require_fairseq("flags")
    from fairseq_lightrnn.commands.flags import main

    sys.exit(main([flag for flag in sys.argv[1:] if flag not in ("-h", "--help")]))
