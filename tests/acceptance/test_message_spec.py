"""jupyter_kernel_test's message spec, over every way that leads to a Docker kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import jupyter_kernel_test
import pytest
from jupyter_client.manager import start_new_kernel

from tests.acceptance.conftest import RemoteKernels
from tests.gateways import Gateway
from tests.kernel_socket import KernelSocket, WebsocketKernelClient


class IPythonSamples:
    """What an IPython kernel must do; the same samples as in jupyter_kernel_test's own tests."""

    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    completion_samples: ClassVar[list[dict[str, Any]]] = [
        {"text": "zi", "matches": {"zip"}},
    ]
    complete_code_samples: ClassVar[list[str]] = ["1", "print('hello, world')", "def f(x):\n  x\n"]
    incomplete_code_samples: ClassVar[list[str]] = ["print('''hello", "def f(x):\n  x*2"]
    invalid_code_samples: ClassVar[list[str]] = ["import = 7q"]
    code_page_something = "zip?"
    code_generate_error = "raise"
    code_execute_result: ClassVar[list[dict[str, str]]] = [
        {"code": "1+2+3", "result": "6"},
        {"code": "[n*n for n in range(1, 4)]", "result": "[1, 4, 9]"},
    ]
    code_display_data: ClassVar[list[dict[str, str]]] = [
        {
            "code": "from IPython.display import HTML, display; display(HTML('<b>test</b>'))",
            "mime": "text/html",
        },
        {
            "code": "from IPython.display import Math, display; display(Math('\\\\frac{1}{2}'))",
            "mime": "text/latex",
        },
    ]
    code_history_pattern = "1?2*"
    supported_history_operations = ("tail", "search")
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"

    @classmethod
    def setUpClass(cls) -> None:
        """The fixtures below have done it."""

    @classmethod
    def tearDownClass(cls) -> None:
        """And undo it."""


class ThroughTheGateway(IPythonSamples):
    framing: str

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def kernel(cls, docker_gateway: Gateway) -> Iterator[None]:
        kernel_id = docker_gateway.start_kernel(name="python3")
        with KernelSocket(docker_gateway, kernel_id, cls.framing) as kernel_socket:
            kernel_socket.execute("import IPython")  # it answers before the first test
            cls.kc = WebsocketKernelClient(kernel_socket)
            yield
        docker_gateway.stop_kernel(kernel_id)


class TestLegacyFraming(ThroughTheGateway, jupyter_kernel_test.KernelTests):
    framing = "legacy"


class TestV1Framing(ThroughTheGateway, jupyter_kernel_test.KernelTests):
    framing = "v1"


class TestInstalledKernelspec(IPythonSamples, jupyter_kernel_test.KernelTests):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def kernel(cls, remote_kernels: RemoteKernels) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in remote_kernels.home.env.items():
                if name.startswith(("JUPYTER", "IPYTHON", "SORNA", "HOME")):
                    patch.setenv(name, value)
            cls.km, cls.kc = start_new_kernel(kernel_name=remote_kernels.kernel_name)
            yield
            cls.kc.stop_channels()
            cls.km.shutdown_kernel()
