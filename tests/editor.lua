-- Lets Neovim ask a Pi for what comes after the cursor, the way llama.vim does: curl sends each request, the completion
-- is shown as virtual text, and Tab inserts it. CEREBRUM_URL is the Pi's URL. Only for the tests.
--
-- g:cerebrum_hint is the completion that Tab would insert, g:cerebrum_shown the virtual text in the buffer.

local space = vim.api.nvim_create_namespace("cerebrum")
local latest = 0 -- the number of the newest request: answers to older ones come too late

local function show(text)
  vim.g.cerebrum_hint = text
  vim.api.nvim_buf_clear_namespace(0, space, 0, -1)
  if text ~= "" then
    local row, column = unpack(vim.api.nvim_win_get_cursor(0))
    local mark = vim.api.nvim_buf_set_extmark(0, space, row - 1, column, {
      virt_text = { { text, "Comment" } },
      virt_text_pos = "inline",
    })
    local details = vim.api.nvim_buf_get_extmark_by_id(0, space, mark, { details = true })[3]
    vim.g.cerebrum_shown = details.virt_text[1][1]
  end
end

local function ask()
  local row, column = unpack(vim.api.nvim_win_get_cursor(0))
  local lines = vim.api.nvim_buf_get_lines(0, 0, -1, false)
  local line = lines[row]
  local before, after = vim.list_slice(lines, 1, row - 1), vim.list_slice(lines, row + 1)
  local body = vim.json.encode({
    input_prefix = table.concat(before, "\n") .. (row > 1 and "\n" or ""),
    prompt = line:sub(1, column),
    input_suffix = line:sub(column + 1) .. "\n" .. table.concat(after, "\n") .. "\n",
    n_predict = 32,
    stream = false,
    cache_prompt = true,
    t_max_predict_ms = 1000,
    response_fields = { "content" },
    filename = vim.fn.expand("%:t"),
  })
  latest = latest + 1
  local number = latest
  local job = vim.fn.jobstart({ "curl", "-s", "--noproxy", "*", "--data", "@-", vim.env.CEREBRUM_URL .. "/infill" }, {
    stdout_buffered = true,
    on_stdout = function(_, data)
      local raw = table.concat(data, "\n")
      if number == latest and raw:find('"content":"', 1, true) then
        show(vim.json.decode(raw).content)
      end
    end,
  })
  vim.fn.chansend(job, body)
  vim.fn.chanclose(job, "stdin")
end

vim.api.nvim_create_autocmd("TextChangedI", {
  callback = function()
    show("")
    ask()
  end,
})
vim.keymap.set("i", "<Tab>", function()
  latest = latest + 1
  local text = vim.g.cerebrum_hint
  show("")
  vim.api.nvim_put(vim.split(text, "\n"), "c", false, true)
end)
show("")
