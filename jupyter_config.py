# A commented sample of every common setting of `jupyter sorna`.
#
# Use it with `jupyter sorna --config=jupyter_config.py`, or copy it to
# ~/.jupyter/jupyter_sorna_config.py. Every line shows the default. On the command line, the same
# settings are written --SornaApp.start_timeout=60; `jupyter sorna --help-all` lists them all.

c = get_config()  # noqa: F821

# -- Where it listens ------------------------------------------------------------------------

# c.ServerApp.ip = "localhost"
# c.ServerApp.port = 8888
# c.ServerApp.base_url = "/"
# c.ServerApp.certfile = ""              # TLS: certificate and key
# c.ServerApp.keyfile = ""
# c.ServerApp.open_browser = True
# c.ServerApp.root_dir = ""              # notebooks; default: where it was started
# c.IdentityProvider.token = ""          # default: a new random one at each start

# Kernels only: no UI, contents or terminals.
# c.SornaApp.headless = False

# -- Where it keeps things -------------------------------------------------------------------

# c.SornaApp.data_dir = ""               # default: `sorna` in Jupyter's data directory
# c.SornaApp.runtime_dir = ""            # sockets; a short path
# c.SornaApp.database_url = ""           # default: SQLite in the data directory;
#                                        # or postgresql+psycopg2://user:password@host/sorna
# c.SornaApp.redis_url = ""              # default: live state in memory; or redis://host:6379

# -- How kernels run -------------------------------------------------------------------------

# c.SornaApp.runtime = "auto"            # auto: docker if an engine answers, else local
# c.SornaApp.base_image = ""             # default: python:3.12-slim
# c.SornaApp.build_images = True
# c.SornaApp.default_kernelspec = "python3"
# c.SornaApp.keep_kernels = False        # leave kernels running when the server stops
# c.SornaApp.orphan_timeout = 60         # seconds; after a kill -9 of the server
# c.SornaApp.start_timeout = 60
# c.SornaApp.start_wait = 10
# c.SornaApp.image_timeout = 1800
# c.SornaApp.idle_timeout = 0            # seconds; 0: idle kernels are never stopped

# What a kernel may use, and the most that a request may ask for (empty or 0: no bound).
# c.SornaApp.default_memory = "2 GiB"
# c.SornaApp.default_cpus = 0
# c.SornaApp.default_pids = 256
# c.SornaApp.default_disk = "256 MiB"
# c.SornaApp.max_memory = ""
# c.SornaApp.max_cpus = 0
# c.SornaApp.max_pids = 4096
# c.SornaApp.max_disk = ""
# c.SornaApp.memory_overcommit = 4       # times the machine's memory, promised to kernels together
# c.SornaApp.max_kernels = 0             # of one user at a time

# -- Messages --------------------------------------------------------------------------------

# The largest message that a client may send, in bytes.
# c.SornaApp.max_input_message = "100 MiB"
# c.SornaApp.max_output_message = "1 GiB"
# c.SornaApp.output_retention = "64 MiB"       # of each kernel, for who comes late or comes back
# c.SornaApp.total_output_retention = "8 GiB"  # of all kernels
# c.SornaApp.unattended_after = 3             # seconds; then a closed page's outputs are written
# c.SornaWebsocketConnection.max_unsent_bytes = 16 * 1024**2  # a client

# -- Agents ----------------------------------------------------------------------------------

# c.SornaApp.embedded_agent = True
# c.SornaApp.manager_address = "tcp://127.0.0.1:*"   # tcp://*:5001 lets other machines join
# c.SornaApp.lost_agent_timeout = 15
# c.SornaApp.lost_kernel_timeout = 600
