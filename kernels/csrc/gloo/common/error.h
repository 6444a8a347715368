#pragma once
// Stand-in (README.md): nothing of it is needed.
