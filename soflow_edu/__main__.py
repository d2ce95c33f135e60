"`python -m soflow_edu` is the program `soflow`."

from soflow_edu.cli import main

main()
